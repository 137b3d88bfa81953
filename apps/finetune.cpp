#include <fmt/format.h>

#include <filesystem>
#include <random>
#include <sstream>

#include "common.h"
#include "examples.h"
#include "finetune_facts.h"
#include "finetune_flags.h"
#include "finetune_report.h"
#include "from_scratch.h"
#include "gemma_torch/adapt/peft.h"
#include "gemma_torch/adapt/sparse_embedding.h"
#include "gemma_torch/adapt/trained_set.h"
#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/io/hf_folder.h"
#include "launch.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace gemma_torch::apps {
namespace {

using json = nlohmann::json;

Schedule parse_schedule(const std::string& name) {
  constexpr std::pair<const char*, Schedule> kNames[] = {{"constant", Schedule::kConstant},
                                                         {"linear", Schedule::kLinear},
                                                         {"cosine", Schedule::kCosine}};
  for (const auto& [known, schedule] : kNames) {
    if (name == known) {
      return schedule;
    }
  }
  fail("[finetune] --schedule: expected constant, linear or cosine, got {}", name);
}

std::unique_ptr<TrainingData> open_data(const std::string& path,
                                        const Pretrained& loaded,
                                        const FinetuneFlags& flags) {
  const auto name = path == flags.data ? "data.jsonl" : "eval_data.jsonl";
  auto data = open_examples("finetune",
                            flags.plain_text ? make_windows(flags, loaded, path, name) : path,
                            loaded,
                            flags.examples);
  if (join_ranks().rank() != 0) {
    return data;
  }
  fmt::print(stderr,
             "gemma: {}: {} examples, {} tokens, {} of them targets; {} cut to {} tokens, {} left "
             "out without a target\n",
             path,
             data->size(),
             data->tokens(),
             data->targets(),
             data->truncated(),
             flags.examples.max_tokens,
             data->left_out());
  return data;
}

// Batches of `epochs` epochs over those of a step, the last step being as long as is left.
int64_t count_steps(const Batches& batches, const FinetuneFlags& flags) {
  if (flags.max_steps > 0) {
    return flags.max_steps;
  }
  int64_t count = 0;
  for (int64_t epoch = 0; epoch < flags.epochs; ++epoch) {
    count += batches.per_epoch(epoch);
  }
  const auto of_a_step = flags.trainer.accumulate * flags.batches.ranks;
  return (count + of_a_step - 1) / of_a_step;
}

// On several ranks, those of rank 0.
uint64_t rank_0s(uint64_t number) {
  return std::stoull(join_ranks().gather(std::to_string(number)).front());
}

// Activations come and go by the megabyte: given back to the system each time, their pages would be cleared each time.
void keep_freed_memory() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  mallopt(M_TOP_PAD, 64 << 20);
#endif
}

// What the model wrote before its first step; a resumed run has it from then.
json samples_before(const FinetuneFlags& flags,
                    const Pretrained& loaded,
                    const TrainingData& data) {
  const auto path = flags.run.out + "/samples.json";
  if (flags.run.resume && std::filesystem::exists(path)) {
    return read_json(flags.run.out, "samples.json").value("before", json::array());
  }
  const auto samples = write_samples(loaded, data, flags.samples);
  write_file(path,
             json{{"before", samples}}.dump(2, ' ', false, json::error_handler_t::replace) + "\n");
  return samples;
}

void write_page(const FinetuneFlags& flags, FinetunePage page) {
  std::istringstream lines(read_file(flags.run.out + "/log.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    page.log.push_back(json::parse(line));
  }
  write_file(flags.run.out + "/report.html", finetune_page(page));
}

void tell(const FinetuneFlags& flags,
          const FinetuneSummary& done,
          const std::string& result,
          int64_t exchanged_bytes) {
  const auto speed = done.seconds > 0 ? static_cast<double>(done.tokens) / done.seconds : 0;
  if (flags.json) {
    print_json({{"out", result},
                {"steps", flags.trainer.steps},
                {"loss", done.steps > 0 ? json(done.loss) : json()},
                {"best_step", done.best ? json(done.best->step) : json()},
                {"best_eval_loss", done.best ? json(done.best->loss) : json()},
                {"stopped_early", done.stopped_early},
                {"seed", *flags.seed},
                {"tokens", done.tokens},
                {"seconds", done.seconds},
                {"ranks", flags.batches.ranks},
                {"exchanged_bytes_per_step", exchanged_bytes},
                {"waited_seconds", done.waited},
                {"tokens_per_second", speed},
                {"peak_memory_bytes", peak_memory_bytes()}});
    return;
  }
  print_text(fmt::format("{}: {} steps, {} tokens, {:.0f} tok/s, peak memory {:.2f} GB\n",
                         result,
                         done.steps,
                         done.tokens,
                         speed,
                         static_cast<double>(peak_memory_bytes()) / 1e9));
}

double default_learning_rate(const FinetuneFlags& flags) {
  return !flags.from_scratch.empty() ? 1e-3 : flags.trains_weights() ? 2e-5 : 2e-4;
}

// Leaves the embedding's other rows as they are, in training and out of the optimiser's memory.
void limit_embedding(const TrainingData& data,
                     const Pretrained& loaded,
                     TrainingPass& pass,
                     std::vector<TrainedTensor>& trained) {
  Progress progress("looking for tokens: examples");
  const bool leads = join_ranks().rank() == 0;
  const auto rows = ids_seen(data, [&](int64_t done, int64_t total) {
    leads ? progress.show(done, total) : void();
    check(!interrupted(), "[finetune] stopped before the first step");
  });
  train_rows(rows, loaded.model, pass, trained);
  if (!leads) {
    return;
  }
  fmt::print(stderr,
             "gemma: {} of the embedding's {} rows are trained, those of tokens in the data\n",
             rows.size(0),
             loaded.config.vocab_size);
}

Adapter begin_adapter(FinetuneFlags& flags, Gemma3Model model) {
  if (!flags.from.empty()) {
    auto adapter = load_adapter(model, flags.from);
    flags.lora = adapter.config();
    return adapter;
  }
  flags.lora.alpha = flags.alpha.value_or(2.0 * static_cast<double>(flags.lora.rank));
  return {model, flags.lora};
}

// What the flags leave open, alike on all ranks.
void settle(FinetuneFlags& flags) {
  const auto& ranks = join_ranks();
  check(ranks.size() == 1 || (flags.from_scratch.empty() && !flags.plain_text),
        "[finetune] --from-scratch, --plain-text: expected one process to make the model and cut "
        "the text, got {} ranks. Hint: one process for a step, then --full --model OUT/initial "
        "--data OUT/data.jsonl on all",
        ranks.size());
  flags.trainer.schedule = parse_schedule(flags.schedule);
  flags.trainer.adamw.state = parse_dtype(flags.optimizer_dtype, at::kFloat);
  flags.trainer.learning_rate = flags.learning_rate.value_or(default_learning_rate(flags));
  flags.seed = flags.seed ? *flags.seed : rank_0s(std::random_device{}());
  flags.batches.rank = ranks.rank();
  flags.batches.ranks = ranks.size();
  flags.batches.seed = *flags.seed;
  flags.batches.shuffle = !flags.in_order;
  flags.batches.max_tokens = flags.examples.max_tokens;
  if (!flags.from_scratch.empty()) {
    flags.full = true;
    flags.model.model = make_initial(flags);
  }
}

// What is trained, and where it goes.
struct Goal {
  std::optional<Adapter> adapter;  // else weights
  std::vector<TrainedTensor> trained = {};
  std::string result = {};
};

Goal goal_of(FinetuneFlags& flags, Gemma3Model model) {
  Goal goal{.adapter = std::nullopt,
            .result = flags.run.out + (flags.trains_weights() ? "/model" : "/adapter")};
  check(!std::filesystem::exists(goal.result),
        "[finetune] {}: expected no such folder, the run is finished. Hint: another --out",
        goal.result);
  if (flags.trains_weights()) {
    goal.trained =
        train_parameters(model, flags.full ? std::vector<std::string>{"*"} : flags.train);
  } else {
    goal.adapter.emplace(begin_adapter(flags, model));
    goal.adapter->attach();
    goal.trained = train_adapter(model, *goal.adapter, /*narrow=*/true);
  }
  return goal;
}

void save_result(const Goal& goal, const Pretrained& loaded, const std::string& base) {
  if (goal.adapter) {
    save_adapter(*goal.adapter, goal.result, base);
    return;
  }
  AtomicFolder out(goal.result);
  write_model(base, loaded, out);
  out.commit();
}

struct Examples {
  const TrainingData* train;
  const TrainingData* held_out;  // null: none
};

void train(FinetuneFlags& flags, const Pretrained& loaded, const Examples& data, Goal& goal) {
  const bool leads = join_ranks().rank() == 0;
  Batches batches(*data.train, flags.batches);
  flags.trainer.steps = count_steps(batches, flags);
  flags.trainer.epochs = flags.max_steps > 0 ? 0 : flags.epochs;
  std::optional<Batches> held_out;
  if (data.held_out != nullptr) {
    auto options = flags.batches;
    options.shuffle = false;
    held_out.emplace(*data.held_out, options);
  }
  TrainingPass pass(loaded.model, flags.pass);
  if (flags.sparse_embedding) {
    limit_embedding(*data.train, loaded, pass, goal.trained);
  }
  Trainer trainer(loaded.model, pass, batches, goal.trained, flags.trainer);
  flags.run.facts = facts_of(flags, loaded, *data.train);
  check_alike(flags.run.facts);
  if (leads) {
    fmt::print(stderr, "gemma: {} steps, seed {}\n", flags.trainer.steps, *flags.seed);
  }
  FinetuneRun run({loaded.model, &pass, &trainer, held_out ? &*held_out : nullptr, join_ranks()},
                  flags.run);
  const auto& asked = data.held_out != nullptr ? *data.held_out : *data.train;
  FinetunePage page{.title = "Fine-tuning on " + flags.data};
  if (leads) {
    page.before = samples_before(flags, loaded, asked);
  }
  const auto done = run.run();
  if (leads) {
    save_result(goal, loaded, model_path(flags.model.model));
    page.after = write_samples(loaded, asked, flags.samples);
    write_page(flags, std::move(page));
    tell(flags, done, goal.result, trainer.exchanged_bytes());
  }
}

void run_finetune(FinetuneFlags flags) {
  check_usage(flags);
  keep_freed_memory();
  catch_interrupt();
  settle(flags);
  const auto loaded = load_modules("finetune", flags.model);
  const auto data = open_data(flags.data, loaded, flags);
  const auto held_out =
      flags.eval_data.empty() ? nullptr : open_data(flags.eval_data, loaded, flags);
  torch::manual_seed(*flags.seed);
  auto goal = goal_of(flags, loaded.model);
  train(flags, loaded, {data.get(), held_out.get()}, goal);
}

}  // namespace

void add_finetune(CLI::App& app) {
  auto* command =
      app.add_subcommand("finetune", "train an adapter, or the weights, on your examples");
  auto flags = std::make_shared<FinetuneFlags>();
  add_finetune_flags(*command, *flags);
  command->callback([flags] { run_finetune(*flags); });
}

}  // namespace gemma_torch::apps
