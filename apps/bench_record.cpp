#include "bench_record.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <ctime>

#include "gemma_torch/base/device.h"

namespace gemma_torch::apps {
namespace {

using Record = nlohmann::ordered_json;

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

void add_model(Record& record, const Pretrained& loaded, const ModelOptions& options) {
  const auto count = parameter_count(loaded.model);
  const auto device = loaded.model->tok_emb->weight.device();
  const auto millions = static_cast<double>(count) / 1e6;
  const auto dtype = loaded.config.dtype;
  record["build_commit"] = GEMMA_TORCH_VERSION;
  record["build_number"] = 0;  // a release has a version instead
  record["cpu_info"] = cpu_name();
  record["gpu_info"] = device.is_cpu() ? "" : device.str();
  record["backends"] = device.is_cpu() ? "CPU" : device.is_cuda() ? "CUDA" : "MPS";
  record["model_filename"] = model_path(options.model);
  record["model_type"] = fmt::format("gemma3 {:.0f}M {}", millions, dtype_name(dtype));
  record["model_size"] = count * static_cast<int64_t>(c10::elementSize(dtype));
  record["model_n_params"] = count;
}

// What llama-bench can set and this program cannot stands at llama-bench's defaults: its readers
// refuse a record that lacks a field, and compare only records that agree in them.
void add_settings(Record& record, const BenchTest& test, const char* kv_type) {
  record["n_batch"] = test.n_batch;
  record["n_ubatch"] = test.n_ubatch;
  record["n_threads"] = test.n_threads;
  record["cpu_mask"] = "0x0";
  record["cpu_strict"] = false;
  record["poll"] = 50;
  record["type_k"] = kv_type;
  record["type_v"] = kv_type;
  record["n_gpu_layers"] = -1;
  record["n_cpu_moe"] = 0;
  record["split_mode"] = "layer";
  record["main_gpu"] = 0;
  record["no_kv_offload"] = false;
  record["flash_attn"] = -1;
  record["devices"] = "auto";
  record["tensor_split"] = "0.00";
  record["tensor_buft_overrides"] = "none";
  record["load_mode"] = "auto";
  record["lazy_mode"] = "auto";
  record["embeddings"] = false;
  record["no_op_offload"] = 0;
  record["no_host"] = false;
  record["repack"] = true;
  record["fit_target"] = 0;
  record["fit_min_ctx"] = 0;
}

// Returns the spread of the rates.
Spread add_times(Record& record, const BenchTest& test, const std::vector<double>& seconds) {
  const auto tokens = static_cast<double>((test.n_prompt + test.n_gen) * test.n_sequences);
  std::vector<int64_t> nanoseconds;
  std::vector<double> rates;
  for (const auto sample : seconds) {
    nanoseconds.push_back(std::llround(sample * 1e9));
    rates.push_back(tokens / sample);
  }
  const auto time = spread({nanoseconds.begin(), nanoseconds.end()});
  const auto rate = spread(rates);
  record["n_prompt"] = test.n_prompt;
  record["n_gen"] = test.n_gen;
  record["n_depth"] = test.n_depth;
  record["test_time"] = fmt::format("{:%FT%TZ}", fmt::gmtime(std::time(nullptr)));
  record["avg_ns"] = std::llround(time.mean);
  record["stddev_ns"] = std::llround(time.stddev);
  record["avg_ts"] = rate.mean;
  record["stddev_ts"] = rate.stddev;
  record["samples_ns"] = nanoseconds;
  record["samples_ts"] = rates;
  record["median_ts"] = rate.median;
  record["min_ts"] = rate.min;
  record["max_ts"] = rate.max;
  return rate;
}

void add_bandwidth(Record& record,
                   const BenchTest& test,
                   const BenchResult& result,
                   double tokens_per_second,
                   const Roofline& roofline) {
  const bool steps_only = test.n_prompt == 0;
  const auto bytes_per_step = result.engine.bytes_per_token;
  const auto steps_per_second = tokens_per_second / static_cast<double>(test.n_sequences);
  const auto achieved = static_cast<double>(bytes_per_step) * steps_per_second;
  // Each repetition has the readings just before and just after it: memory is faster in some seconds than in others.
  std::vector<double> readings, shares;
  for (size_t i = 0; i < result.seconds.size(); ++i) {
    const auto pass = (roofline.seconds[i] + roofline.seconds[i + 1]) / 2;
    readings.push_back(roofline.bytes / pass / 1e9);
    const auto bytes = static_cast<double>(bytes_per_step * test.n_gen);
    shares.push_back(bytes / result.seconds[i] / 1e9 / readings.back());
  }
  const auto share = spread(shares).median;
  const auto if_steps = [&](auto value) { return steps_only ? Record(value) : Record(); };
  record["bytes_per_token"] = if_steps(bytes_per_step);
  record["achieved_gb_s"] = if_steps(achieved / 1e9);
  record["roofline_gb_s"] = roofline.bytes_per_second / 1e9;
  record["roofline_reading"] = roofline.reading;
  record["roofline_share"] = if_steps(share);
  record["samples_roofline_gb_s"] = readings;
  record["roofline_exceeded"] = steps_only && share > kMostShare;
}

Record kernel_table(const std::vector<KernelTime>& kernels, int64_t tokens) {
  auto table = Record::array();
  double all = 0;
  for (const auto& kernel : kernels) {
    all += kernel.seconds;
  }
  for (const auto& kernel : kernels) {
    const auto count = static_cast<double>(tokens);
    table.push_back({{"kernel", kernel.kernel},
                     {"us_per_token", kernel.seconds * 1e6 / count},
                     {"calls_per_token", static_cast<double>(kernel.calls) / count},
                     {"share", all > 0 ? kernel.seconds / all : 0}});
  }
  return table;
}

}  // namespace

Spread spread(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  const auto count = samples.size();
  const auto n = static_cast<double>(count);
  double sum = 0;
  for (const auto sample : samples) {
    sum += sample;
  }
  const auto mean = sum / n;
  double squares = 0;
  for (const auto sample : samples) {
    squares += (sample - mean) * (sample - mean);
  }
  return {.mean = mean,
          .stddev = count > 1 ? std::sqrt(squares / (n - 1)) : 0.0,
          .median = (samples[(count - 1) / 2] + samples[count / 2]) / 2,
          .min = samples.front(),
          .max = samples.back()};
}

nlohmann::ordered_json make_record(const BenchTest& test,
                                   const BenchResult& result,
                                   const Roofline& roofline,
                                   const Pretrained& loaded,
                                   const ModelOptions& options) {
  Record record;
  add_model(record, loaded, options);
  add_settings(record, test, llama_type(parse_dtype(options.kv, loaded.config.dtype)));
  const auto rate = add_times(record, test, result.seconds);
  record["engine"] = result.engine.engine;
  record["isa"] = result.engine.isa;
  record["cached"] = result.engine.cached;
  record["device"] = loaded.model->tok_emb->weight.device().str();
  record["dtype"] = dtype_name(loaded.config.dtype);
  record["weights"] = result.engine.weights;
  record["quant"] = result.engine.quant();
  record["n_sequences"] = test.n_sequences;
  record["top_k"] = test.top_k;
  record["tokens"] = result.any_tokens ? "any" : "text";
  add_bandwidth(record, test, result, rate.median, roofline);
  record["time_to_first_token_ms"] = spread(result.first_token_seconds).median * 1e3;
  record["peak_memory_bytes"] = result.peak_memory;
  record["peak_device_memory_bytes"] =
      result.peak_device_memory ? Record(*result.peak_device_memory) : Record();
  record["logits_hash"] = result.hash ? Record(fmt::format("{:016x}", *result.hash)) : Record();
  record["profile"] = kernel_table(result.kernels, test.n_prompt + test.n_gen);
  return record;
}

}  // namespace gemma_torch::apps
