#include "gemma_torch/adapt/peft.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/io/hf_folder.h"
#include "gemma_torch/io/safetensors.h"

namespace gemma_torch {
namespace {

constexpr char kConfig[] = "adapter_config.json";
constexpr char kWeights[] = "adapter_model.safetensors";
constexpr char kPrefix[] = "base_model.model.";  // of PEFT's names, before those of transformers

// Fields that say nothing about the numbers of a trained adapter, whatever is in them.
const std::set<std::string> kFree = {"auto_mapping",
                                     "base_model_name_or_path",
                                     "inference_mode",
                                     "init_lora_weights",
                                     "megatron_core",
                                     "peft_version",
                                     "qalora_group_size",
                                     "revision",
                                     "task_type",
                                     "ensure_weight_tying"};
const std::set<std::string> kRead = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "bias"};

bool says_nothing(const nlohmann::json& value) {
  return value.is_null() || value == false ||
         ((value.is_object() || value.is_array()) && value.empty());
}

template <typename T>
T field(const nlohmann::json& json, const char* name, const std::string& place) {
  try {
    return json.at(name).get<T>();
  } catch (const nlohmann::json::exception&) {
    fail("[peft] {}: {}: expected another kind of value, got {}",
         place,
         name,
         json.contains(name) ? json[name].dump() : "none");
  }
}

LoraConfig config_of(const nlohmann::json& json, const std::string& place) {
  check(json.is_object(), "[peft] {}: expected a JSON object", place);
  check(json.value("peft_type", nlohmann::json()) == "LORA",
        "[peft] {}: peft_type: expected LORA, got {}",
        place,
        json.value("peft_type", nlohmann::json()).dump());
  const auto bias = json.value("bias", nlohmann::json("none"));
  check(bias == "none", "[peft] {}: bias: expected none, got {}", place, bias.dump());
  for (const auto& [name, value] : json.items()) {
    check(kFree.contains(name) || kRead.contains(name) || says_nothing(value),
          "[peft] {}: {}: expected none, it is not supported here, got {}",
          place,
          name,
          value.dump());
  }
  return validated(
      {.rank = field<int64_t>(json, "r", place),
       .alpha = field<double>(json, "lora_alpha", place),
       .dropout = json.contains("lora_dropout") ? field<double>(json, "lora_dropout", place) : 0,
       .use_rslora = json.contains("use_rslora") && field<bool>(json, "use_rslora", place),
       .target_modules = field<std::vector<std::string>>(json, "target_modules", place)});
}

nlohmann::json json_of(const LoraConfig& config, const std::string& base) {
  return {{"peft_type", "LORA"},
          {"task_type", "CAUSAL_LM"},
          {"base_model_name_or_path", base},
          {"bias", "none"},
          {"inference_mode", true},
          {"r", config.rank},
          {"lora_alpha", config.alpha},
          {"lora_dropout", config.dropout},
          {"use_rslora", config.use_rslora},
          {"target_modules", config.target_modules}};
}

}  // namespace

void save_adapter(const Adapter& adapter, const std::string& folder, const std::string& base) {
  AtomicFolder out(folder);
  write_file(out.file(kConfig), json_of(adapter.config(), base).dump(2) + "\n");
  TensorMap tensors;
  for (const auto& [name, tensor] : adapter.tensors()) {
    tensors.emplace(kPrefix + name, tensor.detach());
  }
  save_safetensors(out.file(kWeights), tensors, {{"format", "pt"}});
  out.commit();
}

Adapter load_adapter(Gemma3Model model, const std::string& folder) {
  const auto place = folder + "/" + kConfig;
  const auto json = read_json(folder, kConfig);
  check(!json.is_null(), "[peft] {}: expected a file, there is none", place);
  Adapter adapter(std::move(model), config_of(json, place));
  const auto path = folder + "/" + kWeights;
  auto tensors = load_safetensors(path);
  const torch::NoGradGuard no_grad;
  for (const auto& [name, into] : adapter.tensors()) {
    const auto found = tensors.find(kPrefix + name);
    check(found != tensors.end(), "[peft] {}: expected {}{}, it is not there", path, kPrefix, name);
    check(found->second.sizes() == into.sizes(),
          "[peft] {}: {}: expected shape ({}), got ({})",
          path,
          found->first,
          fmt::join(into.sizes(), ", "),
          fmt::join(found->second.sizes(), ", "));
    into.copy_(found->second);
    tensors.erase(found);
  }
  check(tensors.empty(),
        "[peft] {}: {}: expected only matrices of target_modules, got this one too",
        path,
        tensors.empty() ? "" : tensors.begin()->first);
  return adapter;
}

}  // namespace gemma_torch
