#include "gemma_torch/io/hf_folder.h"

#include <ATen/ops/equal.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/base/memory.h"
#include "gemma_torch/io/safetensors.h"
#include "gemma_torch/io/strict_json.h"
#include "gemma_torch/quant/packed_linear.h"
#include "gemma_torch/quant/quantize.h"
#include "gemma_torch/quant/scanned_head.h"

namespace gemma_torch {
namespace {

namespace fs = std::filesystem;

// ours -> theirs, within a layer
constexpr std::pair<const char*, const char*> kLayerNames[] = {
    {"att.W_query.weight", "self_attn.q_proj.weight"},
    {"att.W_key.weight", "self_attn.k_proj.weight"},
    {"att.W_value.weight", "self_attn.v_proj.weight"},
    {"att.out_proj.weight", "self_attn.o_proj.weight"},
    {"att.q_norm.scale", "self_attn.q_norm.weight"},
    {"att.k_norm.scale", "self_attn.k_norm.weight"},
    {"ff.fc1.weight", "mlp.gate_proj.weight"},
    {"ff.fc2.weight", "mlp.up_proj.weight"},
    {"ff.fc3.weight", "mlp.down_proj.weight"},
    {"input_layernorm.scale", "input_layernorm.weight"},
    {"post_attention_layernorm.scale", "post_attention_layernorm.weight"},
    {"pre_feedforward_layernorm.scale", "pre_feedforward_layernorm.weight"},
    {"post_feedforward_layernorm.scale", "post_feedforward_layernorm.weight"}};

// "language_model.model.norm.weight" and "model.language_model.norm.weight" -> "model.norm.weight". Other parts of
// a multimodal checkpoint are left out.
TensorMap text_part(TensorMap tensors) {
  bool multimodal = false;
  for (const auto& [name, tensor] : tensors) {
    multimodal |= name.starts_with("language_model.") || name.starts_with("model.language_model.");
  }
  if (!multimodal) {
    return tensors;
  }
  TensorMap text;
  for (auto& [name, tensor] : tensors) {
    if (name.starts_with("language_model.")) {
      text.emplace(name.substr(15), tensor);
    } else if (name.starts_with("model.language_model.")) {
      text.emplace("model." + name.substr(21), tensor);
    } else if (name == "lm_head.weight") {
      text.emplace(name, tensor);
    }
  }
  return text;
}

at::Tensor take(TensorMap& tensors, const std::string& name, const std::string& place) {
  const auto at = tensors.find(name);
  check(at != tensors.end(), "[load_weights] {}: not in {}", name, place);
  auto tensor = at->second;
  tensors.erase(at);
  return tensor;
}

at::Tensor take_weight(TensorMap& tensors, const std::string& name, const std::string& place) {
  auto tensor = take(tensors, name, place);
  check(tensor.is_floating_point(),
        "[load_weights] {}: expected a floating-point tensor, file has {} ({})",
        name,
        c10::toString(tensor.scalar_type()),
        place);
  return tensor;
}

at::Tensor widened(const at::Tensor& tensor, c10::ScalarType dtype) {
  auto copy = zeros_on_large_pages(tensor.sizes(), dtype);
  copy.copy_(tensor);
  return copy;
}

void check_tied_head(TensorMap& tensors, const at::Tensor& embedding, const std::string& place) {
  const auto head = tensors.find("lm_head.weight");
  if (head != tensors.end()) {
    check(at::equal(head->second, embedding),
          "[load_weights] lm_head.weight: expected the values of model.embed_tokens.weight, since "
          "tie_word_embeddings is true ({})",
          place);
    tensors.erase(head);
  }
}

// Without ".weight".
std::string stem(const std::string& name) {
  return name.substr(0, name.rfind('.'));
}

// The projection's name in a layer, here and there: "W_query" -> {"att.W_query", "self_attn.q_proj"}.
std::pair<std::string, std::string> layer_names(const std::string& projection) {
  for (const auto& [ours, theirs] : kLayerNames) {
    if (stem(ours).ends_with("." + projection)) {
      return {stem(ours), stem(theirs)};
    }
  }
  fail("[quant] {}: not a projection of Gemma3Model", projection);
}

std::string hf_projection(const std::string& projection) {
  const auto theirs = layer_names(projection).second;
  return theirs.substr(theirs.find('.') + 1);
}

// Puts packed modules in the place of the model's projections and head.
void fill_packed(Gemma3Model& model,
                 TensorMap& tensors,
                 const Formats& formats,
                 const std::string& place) {
  std::map<std::string, int64_t> layers;
  model->for_each_linear([&](auto& owner, const std::string& name, Linear& linear) {
    const auto in = linear->in_features, out = linear->out_features;
    const auto prefix =
        name == "out_head"
            ? "lm_head"
            : fmt::format("model.layers.{}.{}", layers[name]++, layer_names(name).second);
    std::shared_ptr<LinearImpl> packed;
    try {
      if (name == "out_head") {
        packed = std::make_shared<ScannedHeadImpl>(
            in,
            out,
            ScanTensors{take(tensors, prefix + ".scan_blocks", place),
                        take(tensors, prefix + ".scan_residuals", place),
                        take(tensors, prefix + ".scan_order", place),
                        take(tensors, prefix + ".scan_largest_norm", place)});
        packed->weight = packed->register_parameter("weight", linear->weight);
      } else {
        packed = std::make_shared<PackedLinearImpl>(
            in, out, formats.at(name), slice_of(name, in), take(tensors, prefix + ".cells", place));
      }
    } catch (const Error& error) {
      fail("{} ({}, {})", error.what(), prefix, place);
    }
    replace_linear(owner, name, linear, std::move(packed));
  });
}

}  // namespace

std::string hf_name(const std::string& parameter) {
  if (parameter == "tok_emb.weight") {
    return "model.embed_tokens.weight";
  }
  if (parameter == "final_norm.scale") {
    return "model.norm.weight";
  }
  if (parameter == "out_head.weight") {
    return "lm_head.weight";
  }
  const auto dot = parameter.find('.', 7);  // "blocks.N."
  if (parameter.starts_with("blocks.") && dot != std::string::npos) {
    for (const auto& [ours, theirs] : kLayerNames) {
      if (parameter.compare(dot + 1, std::string::npos, ours) == 0) {
        return "model.layers." + parameter.substr(7, dot - 7) + "." + theirs;
      }
    }
  }
  fail("[hf_name] {}: not a parameter of Gemma3Model", parameter);
}

Gemma3Model build_model(const Gemma3Config& cfg,
                        TensorMap tensors,
                        c10::Device device,
                        const std::string& place,
                        const Formats& formats) {
  tensors = text_part(std::move(tensors));
  Gemma3Model model(cfg, torch::kCPU, Init::kNone);  // memory that is replaced before it is touched
  if (!formats.empty()) {
    check(device.is_cpu(),
          "[quant] a folder of packed weights: expected --device cpu, got {}",
          device.str());
    fill_packed(model, tensors, formats, place);
  }
  if (cfg.tie_word_embeddings) {
    const auto embedding = tensors.find("model.embed_tokens.weight");
    check(embedding != tensors.end(), "[load_weights] model.embed_tokens.weight: not in {}", place);
    check_tied_head(tensors, embedding->second, place);
    model->tie_weights();
  }
  for (auto& item : model->named_parameters()) {
    const auto name = hf_name(item.key());
    const auto tensor = take_weight(tensors, name, place);
    check(tensor.sizes() == item.value().sizes(),
          "[load_weights] {}: expected {}, file has {} ({})",
          name,
          shape_str(item.value().sizes()),
          shape_str(tensor.sizes()),
          place);
    const bool ready = tensor.device() == device && tensor.scalar_type() == cfg.dtype;
    item.value().set_data(ready             ? tensor
                          : device.is_cpu() ? widened(tensor, cfg.dtype)
                                            : tensor.to(device, cfg.dtype));
  }
  check(tensors.empty(),
        "[load_weights] {}: not a tensor of this model ({}; {} such in all)",
        tensors.empty() ? "" : tensors.begin()->first,
        place,
        tensors.size());
  return model;
}

TensorMap hf_weights(const Gemma3Model& model) {
  TensorMap tensors;
  for (const auto& item : model->named_parameters()) {
    tensors.emplace(hf_name(item.key()), item.value().detach());
  }
  for (const auto& item : model->named_buffers()) {  // of packed modules
    const auto dot = item.key().rfind('.');
    const auto module = stem(hf_name(stem(item.key()) + ".weight"));
    tensors.emplace(module + item.key().substr(dot), item.value());
  }
  return tensors;
}

nlohmann::json formats_to_json(const Formats& formats) {
  auto json = nlohmann::json::object();
  for (const auto& [projection, format] : formats) {
    json[hf_projection(projection)] = kernels::format_name(format);
  }
  return json;
}

Formats formats_from_json(const nlohmann::json& json) {
  Formats formats;
  for (const auto& [projection, unused] : recipes().front().formats) {
    const auto name = hf_projection(projection);
    const auto value = json.is_object() ? json.value(name, nlohmann::json()) : nlohmann::json();
    kernels::Format format{};
    check(value.is_string() && kernels::parse_format(value.get<std::string>().c_str(), format) &&
              format != kernels::Format::kLossless12,
          "[quant] quantization_config.formats.{}: expected levels4, int5, int6 or int8, got {}",
          name,
          value.dump());
    formats.emplace(projection, format);
  }
  return formats;
}

nlohmann::json read_json(const std::string& folder, const std::string& name) {
  const std::string path = folder + "/" + name;
  return fs::exists(path)
             ? parse_strict_json(read_file(path, /*limit=*/1 << 24), /*depth=*/32, path)
             : nlohmann::json();
}

TensorMap read_folder_weights(const std::string& folder, Weights weights) {
  const std::string single = folder + "/model.safetensors";
  const std::string index = folder + "/model.safetensors.index.json";
  check(fs::exists(single) || fs::exists(index),
        "[load_weights] {}: expected model.safetensors or model.safetensors.index.json, found "
        "neither",
        folder);
  if (!fs::exists(single)) {
    return load_sharded_safetensors(index);
  }
  return weights == Weights::kMapped ? load_safetensors(single)
                                     : read_safetensors(read_to_large_pages(single));
}

AtomicFolder::AtomicFolder(const std::string& path) : path_(path) {
  while (path_.size() > 1 && path_.back() == '/') {
    path_.pop_back();
  }
  check(!fs::exists(path_) || (fs::is_directory(path_) && fs::is_empty(path_)),
        "[write] {}: expected a new or empty folder, found one with content. Hint: another name, "
        "or remove it",
        path_);
  temporary_ = path_ + ".XXXXXX";
  check(::mkdtemp(temporary_.data()) != nullptr, "[write] {}: {}", path_, std::strerror(errno));
  fs::permissions(temporary_,
                  fs::perms::owner_all | fs::perms::group_read | fs::perms::group_exec |
                      fs::perms::others_read | fs::perms::others_exec);
}

AtomicFolder::~AtomicFolder() {
  std::error_code ignored;
  if (!temporary_.empty()) {
    fs::remove_all(temporary_, ignored);
  }
}

void AtomicFolder::commit() {
  std::error_code reason;
  fs::rename(temporary_, path_, reason);  // also over an empty folder
  check(!reason, "[write] {}: {}", path_, reason.message());
  temporary_.clear();
}

}  // namespace gemma_torch
