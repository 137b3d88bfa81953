#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/cuda.h>
#include <torch/mps.h>
#include <torch/version.h>

#include "common.h"
#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/engine/graph.h"

namespace gemma_torch::apps {
namespace {

struct InfoFlags {
  std::string model;
  bool json = false;
};

int64_t parameter_count(const Gemma3Model& model) {
  int64_t count = 0;
  for (const auto& parameter : model->parameters()) {
    count += parameter.numel();
  }
  return count;
}

// Both counts that the notebook prints. On the meta device the modules have shapes and no memory.
nlohmann::json parameters_json(const Gemma3Config& config) {
  Gemma3Model model(config, c10::kMeta, Init::kNone);
  const auto separate = parameter_count(model);
  model->tie_weights();
  return {{"with_separate_head", separate}, {"unique", parameter_count(model)}};
}

int64_t cache_bytes(const Gemma3Config& config, int64_t tokens) {
  return KvCache(config, {.capacity = tokens, .device = c10::kMeta, .dtype = config.dtype}).bytes();
}

nlohmann::json memory_json(const Gemma3Config& config, const nlohmann::json& parameters) {
  const char* stored = config.tie_word_embeddings ? "unique" : "with_separate_head";
  const auto size = static_cast<int64_t>(c10::elementSize(config.dtype));
  int64_t full = 0;
  for (const auto type : config.layer_types) {
    full += type == LayerType::kFullAttention ? 1 : 0;
  }
  const auto per_token = 2 * full * config.n_kv_groups * config.head_dim * size;
  return {{"dtype", dtype_name(config.dtype)},
          {"weights_bytes", parameters[stored].get<int64_t>() * size},
          {"kv_cache_bytes_at_1024", cache_bytes(config, 1024)},
          {"kv_cache_bytes_at_4096", cache_bytes(config, 4096)},
          {"kv_cache_bytes_at_context_length", cache_bytes(config, config.context_length)},
          {"kv_cache_bytes_per_further_1024", 1024 * per_token}};
}

nlohmann::json machine_json() {
  auto gpus = nlohmann::json::array();
  const auto count =
      torch::cuda::is_available() ? static_cast<int>(torch::cuda::device_count()) : 0;
  for (int i = 0; i < count; ++i) {
    gpus.push_back(fmt::format("cuda:{}", i));
  }
  if (torch::mps::is_available()) {
    gpus.push_back("mps");
  }
  return {{"cpu", cpu_name()},
          {"cpu_features", cpu_features()},
          {"cores", usable_cores()},
          {"gpus", gpus},
          {"libtorch", TORCH_VERSION},
          {"libtorch_kernels", at::get_cpu_capability()}};
}

nlohmann::json available(const char* kind, const std::string& name, const std::string& why_not) {
  return {{kind, name},
          {"available", why_not.empty()},
          {"why_not", why_not.empty() ? nlohmann::json() : nlohmann::json(why_not)}};
}

// Whether it is here, and whether this version was ever run on one.
nlohmann::json devices_json() {
  auto rows = nlohmann::json::array();
  for (const char* name : {"cpu", "cuda", "mps"}) {
    std::string why_not;
    try {
      parse_device(name);
    } catch (const Error& error) {
      why_not = error.what();
    }
    rows.push_back(available("device", name, why_not));
    rows.back()["tested"] = name == std::string("cpu");
  }
  return rows;
}

nlohmann::json engines_json() {
  auto rows = nlohmann::json::array();
  for (const char* name : {"eager", "fused", "traced"}) {
    rows.push_back(available("engine", name, {}));
  }
  const c10::Device device = torch::cuda::is_available() ? c10::kCUDA : c10::kCPU;
  rows.push_back(available("engine", "graph", graph_refusal(device)));
  return rows;
}

nlohmann::json collect(const std::string& path) {
  auto described = load_description(path);
  auto& config = described.config;
  config = validated(config);
  const auto parameters = parameters_json(config);
  return {{"model", path},
          {"instruct", described.instruct},
          {"stop_ids", described.stop_ids},
          {"sampling",
           {{"temperature", described.sampling.temperature},
            {"top_k", described.sampling.top_k},
            {"top_p", described.sampling.top_p},
            {"min_p", described.sampling.min_p},
            {"repetition_penalty", described.sampling.repetition_penalty}}},
          {"config", config_to_json(config)},
          {"parameters", parameters},
          {"memory", memory_json(config, parameters)},
          {"machine", machine_json()},
          {"devices", devices_json()},
          {"engines", engines_json()}};
}

std::string shown(const nlohmann::json& value, bool bytes) {
  return bytes && value.is_number()
             ? fmt::format("{:.1f} MB", static_cast<double>(value.get<int64_t>()) / 1e6)
             : value.dump();
}

void print_section(const char* title, const nlohmann::json& object, bool bytes = false) {
  print_text(fmt::format("{}\n", title));
  for (const auto& [key, value] : object.items()) {
    print_text(fmt::format("  {:<34} {}\n", key, shown(value, bytes)));
  }
}

void print_rows(const char* title, const char* kind, const nlohmann::json& rows) {
  print_text(fmt::format("{}\n", title));
  for (const auto& row : rows) {
    print_text(
        fmt::format("  {:<34} {}{}\n",
                    row[kind].get<std::string>(),
                    row["available"].get<bool>() ? "yes" : row["why_not"].get<std::string>(),
                    row.value("tested", true) ? "" : "; this version has not been run on one"));
  }
}

void run_info(const InfoFlags& flags) {
  const auto info = collect(model_path(flags.model));
  if (flags.json) {
    print_json(info);
    return;
  }
  print_text(fmt::format(
      "{}\n  {}\n  stop ids {}\n",
      info["model"].get<std::string>(),
      info["instruct"].get<bool>() ? "instruct: trained to chat" : "base: continues text",
      info["stop_ids"].dump()));
  for (const char* title : {"sampling", "config", "parameters"}) {
    print_section(title, info[title]);
  }
  print_section("memory", info["memory"], /*bytes=*/true);
  print_section("machine", info["machine"]);
  print_rows("devices", "device", info["devices"]);
  print_rows("engines", "engine", info["engines"]);
}

}  // namespace

void add_info(CLI::App& app) {
  auto* command =
      app.add_subcommand("info", "shapes, parameters, memory, and what this machine can run");
  auto flags = std::make_shared<InfoFlags>();
  add_model_flag(*command, flags->model);
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->callback([flags] { run_info(*flags); });
}

}  // namespace gemma_torch::apps
