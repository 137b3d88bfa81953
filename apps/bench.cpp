#include <fmt/format.h>

#include "bench_grid.h"
#include "bench_record.h"
#include "bench_writer.h"
#include "common.h"
#include "gemma_torch/base/error.h"

namespace gemma_torch::apps {
namespace {

struct BenchFlags {
  ModelOptions model;
  BenchLists lists;
  BenchHow how;
  std::string output = "md";
  bool json = false;
  bool grid = false;
  TextOptions text;
  std::string small_model, svg;
};

void check_flags(const BenchFlags& flags, const std::string& format) {
  check(
      flags.how.repetitions >= 1, "[bench] -r: expected at least 1, got {}", flags.how.repetitions);
  check(!flags.how.profile || format != "csv",
        "[bench] --profile: expected md, json or jsonl, got csv");
}

void warn_if_exceeded(const nlohmann::ordered_json& record, const BenchTest& test) {
  if (record["roofline_exceeded"].get<bool>()) {
    fmt::print(stderr,
               "gemma: warning: [roofline] {}: {:.1f} GB/s is {:.0f} % of the {:.1f} GB/s measured "
               "beside it: that roofline must be wrong. Hint: is the machine busy?\n",
               test_name(test),
               record["achieved_gb_s"].get<double>(),
               100 * record["roofline_share"].get<double>(),
               record["roofline_gb_s"].get<double>());
  }
}

void run_bench(BenchFlags flags) {
  BenchWriter writer(flags.json ? "json" : flags.output);
  check_flags(flags, writer.format());
  const auto tests = plan(flags.lists);
  RooflineMeter meter;  // before loading starts threads
  flags.model.threads = static_cast<int>(tests[0].n_threads);
  const auto loaded = load(flags.model);
  const auto device = loaded.model->tok_emb->weight.device();
  if (flags.text.file || flags.text.ids) {
    flags.how.ids = read_ids(flags.text, loaded.tokenizer);
  }
  BenchRunner runner(loaded, flags.model, tests, flags.how);
  writer.begin(tests, flags.how.hash);
  Progress progress("test");
  int64_t done = 0;
  for (const auto& test : tests) {
    progress.show(++done, static_cast<int64_t>(tests.size()));
    const auto threads = static_cast<int>(test.n_threads);
    std::vector<Round> rounds;
    const auto result = runner.run(test, [&] { rounds.push_back(meter.now(device, threads)); });
    const auto record = make_record(test, result, best_median(rounds), loaded, flags.model);
    writer.add(record);
    warn_if_exceeded(record, test);
  }
  writer.finish();
}

// One number of a list of flags that the grid takes as it is: what the last one says.
int64_t only_number(const std::vector<std::string>& given, int64_t fallback, const char* flag) {
  if (given.empty()) {
    return fallback;
  }
  check(
      given.back().find_first_not_of("0123456789") == std::string::npos && given.back().size() < 7,
      "[bench] --grid {}: expected one number, got {}",
      flag,
      given.back());
  return std::stoll(given.back());
}

void run_grid_of(const BenchFlags& flags, bool gen_given) {
  GridOptions options{.model = flags.model,
                      .small_model = flags.small_model,
                      .svg = flags.svg,
                      .format = flags.json ? "json" : flags.output,
                      .repetitions = flags.how.repetitions};
  if (gen_given) {
    options.n_gen = only_number(flags.lists.gens, options.n_gen, "-n");
  }
  check(options.n_gen >= 1 && options.repetitions >= 1,
        "[bench] --grid: expected at least 1 for -n and -r, got {} and {}",
        options.n_gen,
        options.repetitions);
  options.model.threads = static_cast<int>(only_number(flags.lists.threads, 0, "-t"));
  run_grid(options);
}

void add_list(CLI::App& command,
              const std::string& names,
              std::vector<std::string>& lists,
              const char* help) {
  auto* option = command.add_option(names, lists, help)->allow_extra_args(false)->type_name("LIST");
  option->default_str(lists.empty() ? "" : lists[0]);
}

void add_test_flags(CLI::App& command, BenchLists& lists) {
  add_list(command, "-p,--n-prompt", lists.prompts, "tokens of a prompt to read; 0: none");
  add_list(command, "-n,--n-gen", lists.gens, "tokens to generate; 0: none");
  command
      .add_option("--pg",
                  lists.pairs,
                  "a prompt and the tokens after it, timed together; also -pg; repeatable")
      ->allow_extra_args(false)
      ->type_name("PP,TG");
  add_list(command, "-d,--n-depth", lists.depths, "tokens in the cache before");
  add_list(command, "-b,--batch-size", lists.batches, "tokens given to the engine at once");
  add_list(command, "--ub,--ubatch-size", lists.ubatches, "tokens of one pass; also -ub");
  add_list(command, "-t,--threads", lists.threads, "[usable physical cores]");
  add_list(command, "--sequences", lists.sequences, "rows that advance together");
  add_list(command, "--top-k", lists.top_ks, "draw from the k most likely; 1: greedy");
}

}  // namespace

void add_bench(CLI::App& app) {
  auto* command = app.add_subcommand(
      "bench",
      "tokens a second, with llama-bench's flags and records. LIST: 512 or 1,2,4 or 128-512+128 or "
      "1-64*2; all combinations are run");
  auto flags = std::make_shared<BenchFlags>();
  auto& how = flags->how;
  add_model_flags(*command, flags->model);
  command->remove_option(command->get_option("--threads"));  // here a list
  add_test_flags(*command, flags->lists);
  command
      ->add_option("-r,--repetitions", how.repetitions, "times each test is run, after a warm-up")
      ->take_last()
      ->capture_default_str();
  command->add_flag("--profile", how.profile, "time per token by kernel, in a run of its own");
  command->add_flag("--hash", how.hash, "a hash of the full head's logits after the last token");
  command->add_option("-o,--output", flags->output, "md, json, jsonl or csv")
      ->take_last()
      ->capture_default_str();
  command->add_option("-f,--file",
                      flags->text.file,
                      "a text to read for depths and prompts [any tokens, the same each time]");
  command->add_option("--ids", flags->text.ids, "token ids to read instead");
  command->add_flag("--json", flags->json, "the same as -o json");
  command->add_flag(
      "--grid",
      flags->grid,
      "the reference's twelve rows and ours, each in a process of its own; -n (64), -r "
      "and -t are single numbers");
  command->add_option(
      "--small-model", flags->small_model, "a folder of gemma quantize, for --grid");
  command->add_option("--svg", flags->svg, "a chart of --grid");
  command->callback([flags, command] {
    if (flags->grid) {
      check(!flags->text.file && !flags->text.ids,
            "[bench] -f and --ids: expected no --grid beside them");
      run_grid_of(*flags, command->count("--n-gen") > 0);
    } else {
      check(flags->svg.empty() && flags->small_model.empty(),
            "[bench] --svg and --small-model: expected --grid beside them");
      run_bench(*flags);
    }
  });
}

}  // namespace gemma_torch::apps
