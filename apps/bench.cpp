#include <ATen/Parallel.h>
#include <ATen/ops/tensor.h>
#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>
#include <random>

#include "bench_record.h"
#include "common.h"
#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "roofline.h"

namespace gemma_torch::apps {
namespace {

using Clock = std::chrono::steady_clock;

struct BenchFlags {
  ModelOptions model;
  std::string prompts = "512";
  std::string gens = "128";
  std::string depths = "0";
  std::vector<std::string> pairs;
  int repetitions = 5;
  std::string output = "md";
  bool json = false;
};

// The same for every test of a run.
struct Setting {
  const Pretrained& loaded;
  const ModelOptions& options;
  int repetitions;
  double roofline;  // bytes a second
};

struct Sample {
  double seconds = 0;
  double first_token_seconds = 0;
};

std::vector<BenchTest> plan(const BenchFlags& flags) {
  std::vector<BenchTest> tests;
  for (const auto depth : parse_range("-d", flags.depths)) {
    for (const auto n : parse_range("-p", flags.prompts)) {
      tests.push_back({.n_prompt = n, .n_depth = depth});
    }
    for (const auto n : parse_range("-n", flags.gens)) {
      tests.push_back({.n_gen = n, .n_depth = depth});
    }
    for (const auto& pair : flags.pairs) {
      tests.push_back(parse_pair(pair));
      tests.back().n_depth = depth;
    }
  }
  std::erase_if(tests, [](const BenchTest& test) { return test.n_prompt + test.n_gen == 0; });
  check(!tests.empty(), "[bench] expected a test, got none. Hint: -p 512 or -n 128");
  return tests;
}

// Any tokens do: a dense model takes the same time for all. Fixed, so that runs are alike.
std::vector<int64_t> some_ids(int64_t count, int64_t vocab_size) {
  std::mt19937_64 random(1);
  std::vector<int64_t> ids(static_cast<size_t>(count));
  for (auto& id : ids) {
    id = static_cast<int64_t>(random() % static_cast<uint64_t>(vocab_size));
  }
  return ids;
}

// Reads n_prompt tokens, then makes n_gen. A token made is one pass and one choice, as in
// llama-bench: the first one follows a token of its own, and so costs a pass too.
Sample run_once(Engine& engine, const BenchTest& test, c10::Device device) {
  synchronize(device);
  Sample sample;
  const auto start = Clock::now();
  const auto seconds = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  if (test.n_prompt > 0) {
    engine.append(some_ids(test.n_prompt, engine.vocab_size()));
    engine.top(/*k=*/1);
    sample.first_token_seconds = seconds();
  }
  if (test.n_gen > 0) {
    engine.append(some_ids(1, engine.vocab_size()));
    engine.decode(test.n_gen, {.temperature = 0}, [&](int64_t, int64_t) {
      if (sample.first_token_seconds == 0) {
        sample.first_token_seconds = seconds();
      }
      return true;
    });
  }
  synchronize(device);
  sample.seconds = seconds();
  return sample;
}

std::vector<Sample> run_test(const BenchTest& test, const Setting& setting) {
  const auto device = setting.loaded.model->tok_emb->weight.device();
  const auto needed = test.n_depth + test.n_prompt + test.n_gen;
  const auto engine = make_engine(setting.loaded, setting.options, needed);
  std::unique_ptr<Engine> prefix;  // the depth is read once, then copied
  if (test.n_depth > 0) {
    prefix = make_engine(setting.loaded, setting.options, needed);
    prefix->append(some_ids(test.n_depth, engine->vocab_size()));
  }
  const auto start_over = [&] { prefix ? engine->copy_from(*prefix) : engine->reset(); };
  start_over();
  run_once(
      *engine, {test.n_prompt, std::min<int64_t>(test.n_gen, 4), test.n_depth}, device);  // warm-up
  std::vector<Sample> samples;
  for (int i = 0; i < setting.repetitions; ++i) {
    start_over();
    samples.push_back(run_once(*engine, test, device));
  }
  return samples;
}

// Bytes one token must read: every weight of the layers and the head once (of the embedding one
// row), and the keys and values it sees, at the middle of the generation.
int64_t bytes_per_token(const BenchTest& test, const Pretrained& loaded, c10::ScalarType kv_dtype) {
  auto model = loaded.model;
  int64_t bytes = 0;
  model->for_each_linear([&](auto&, const std::string&, Linear& linear) {
    bytes += static_cast<int64_t>(linear->weight.nbytes());
  });
  for (const auto& parameter : model->parameters()) {
    bytes += parameter.dim() == 1 ? static_cast<int64_t>(parameter.nbytes()) : 0;  // norms
  }
  const auto& cfg = model->cfg;
  const auto seen = test.n_depth + (test.n_gen + 1) / 2;
  const auto row =
      2 * cfg.n_kv_groups * cfg.head_dim * static_cast<int64_t>(c10::elementSize(kv_dtype));
  for (const auto type : cfg.layer_types) {
    bytes += row * (type == LayerType::kFullAttention ? seen : std::min(seen, cfg.sliding_window));
  }
  return bytes;
}

int64_t parameter_count(const Gemma3Model& model) {
  int64_t count = 0;
  for (const auto& parameter : model->parameters()) {
    count += parameter.numel();
  }
  return count;
}

const char* llama_type(c10::ScalarType dtype) {
  return dtype == c10::kFloat ? "f32" : "bf16";
}

nlohmann::ordered_json describe(const BenchTest& test,
                                const Setting& setting,
                                c10::ScalarType kv_dtype) {
  const auto& loaded = setting.loaded;
  const auto count = parameter_count(loaded.model);
  const auto device = loaded.model->tok_emb->weight.device();
  const auto chunk = EngineOptions{}.chunk;
  return {
      {"build_commit", GEMMA_TORCH_VERSION},
      {"build_number", 0},  // a release has a version instead
      {"cpu_info", cpu_name()},
      {"gpu_info", device.is_cpu() ? "" : device.str()},
      {"backends",
       device.is_cpu()    ? "CPU"
       : device.is_cuda() ? "CUDA"
                          : "MPS"},
      {"model_filename", model_path(setting.options.model)},
      {"model_type",
       fmt::format(
           "gemma3 {:.0f}M {}", static_cast<double>(count) / 1e6, dtype_name(loaded.config.dtype))},
      {"model_size", count * static_cast<int64_t>(c10::elementSize(loaded.config.dtype))},
      {"model_n_params", count},
      {"n_batch", chunk},
      {"n_ubatch", chunk},
      {"n_threads", at::get_num_threads()},
      {"type_k", llama_type(kv_dtype)},
      {"type_v", llama_type(kv_dtype)},
      {"n_prompt", test.n_prompt},
      {"n_gen", test.n_gen},
      {"n_depth", test.n_depth},
      {"test_time", fmt::format("{:%FT%TZ}", fmt::gmtime(std::time(nullptr)))}};
}

nlohmann::ordered_json measure(const BenchTest& test, const Setting& setting) {
  const auto& loaded = setting.loaded;
  const auto kv_dtype = parse_dtype(setting.options.kv, loaded.config.dtype);
  auto record = describe(test, setting, kv_dtype);
  std::vector<double> nanoseconds, rates, first;
  for (const auto& sample : run_test(test, setting)) {
    nanoseconds.push_back(std::round(sample.seconds * 1e9));
    rates.push_back(static_cast<double>(test.n_prompt + test.n_gen) / sample.seconds);
    first.push_back(sample.first_token_seconds * 1e3);
  }
  const auto time = spread(nanoseconds);
  const auto rate = spread(rates);
  record["avg_ns"] = static_cast<int64_t>(time.mean);
  record["stddev_ns"] = static_cast<int64_t>(time.stddev);
  record["avg_ts"] = rate.mean;
  record["stddev_ts"] = rate.stddev;
  record["samples_ns"] = std::vector<int64_t>(nanoseconds.begin(), nanoseconds.end());
  record["samples_ts"] = rates;
  record["engine"] = engine_name(parse_engine(setting.options.engine));
  record["device"] = loaded.model->tok_emb->weight.device().str();
  record["dtype"] = dtype_name(loaded.config.dtype);
  record["bytes_per_token"] = nullptr;  // reading a prompt is bound by arithmetic
  record["achieved_gb_s"] = nullptr;
  if (test.n_prompt == 0) {
    const auto bytes = bytes_per_token(test, loaded, kv_dtype);
    record["bytes_per_token"] = bytes;
    record["achieved_gb_s"] = static_cast<double>(bytes) * rate.mean / 1e9;
  }
  record["roofline_gb_s"] = setting.roofline / 1e9;
  record["time_to_first_token_ms"] = spread(first).mean;
  return record;
}

void run_bench(const BenchFlags& flags) {
  BenchWriter writer(flags.json ? "json" : flags.output);
  const auto tests = plan(flags);
  check(flags.repetitions >= 1, "[bench] -r: expected at least 1, got {}", flags.repetitions);
  const auto loaded = load(flags.model);
  const auto roofline = read_bandwidth(loaded.model->tok_emb->weight.device());
  const Setting setting{loaded, flags.model, flags.repetitions, roofline};
  Progress progress("test");
  int64_t done = 0;
  for (const auto& test : tests) {
    progress.show(++done, static_cast<int64_t>(tests.size()));
    writer.add(measure(test, setting));
  }
  writer.finish();
}

}  // namespace

void add_bench(CLI::App& app) {
  auto* command = app.add_subcommand(
      "bench",
      "tokens a second, with llama-bench's flags and records; lists 1,2,4, ranges 128-512+128");
  auto flags = std::make_shared<BenchFlags>();
  add_model_flags(*command, flags->model);
  command->add_option("-p,--n-prompt", flags->prompts, "tokens of a prompt to read; 0: leave out")
      ->capture_default_str();
  command->add_option("-n,--n-gen", flags->gens, "tokens to generate; 0: leave out")
      ->capture_default_str();
  command->add_option("-d,--n-depth", flags->depths, "tokens in the cache before")
      ->capture_default_str();
  command
      ->add_option(
          "--pg", flags->pairs, "pp,tg: a prompt and the tokens after it, timed together; also -pg")
      ->allow_extra_args(false);
  command->add_option("-r,--repetitions", flags->repetitions, "times each test is run")
      ->capture_default_str();
  command->add_option("-o,--output", flags->output, "md, json, jsonl or csv")
      ->capture_default_str();
  command->add_flag("--json", flags->json, "the same as -o json");
  command->callback([flags] { run_bench(*flags); });
}

}  // namespace gemma_torch::apps
