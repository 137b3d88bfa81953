#include "gemma_torch/inspect/direction.h"

#include <charconv>
#include <cstring>
#include <string_view>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/inspect/site_table.h"
#include "gemma_torch/io/gguf.h"
#include "gemma_torch/io/gguf_writer.h"

namespace gemma_torch {
namespace {

constexpr std::string_view kPrefix = "direction.";
constexpr auto kArchitecture = "general.architecture";
constexpr auto kControlVector = "controlvector";
constexpr std::string_view kMadePrefix = "gemma_torch.";  // before our own keys in a GGUF
constexpr auto kSiteKey = "site";

std::string key_of(int64_t layer) {
  return std::string(kPrefix) + std::to_string(layer);
}

// The layer of "direction.5".
int64_t layer_of(const std::string& key, const std::string& file) {
  int64_t layer = -1;
  const auto digits =
      key.starts_with(kPrefix) ? std::string_view(key).substr(kPrefix.size()) : std::string_view();
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), layer);
  check(!digits.empty() && error == std::errc() && end == digits.data() + digits.size() &&
            layer >= 0 && key == key_of(layer),
        "[direction] {}: expected tensors called direction.LAYER, got {}",
        file,
        printable(key));
  return layer;
}

Site site_of(std::string_view name, const std::string& file) {
  const auto found = find_site(name);
  check(found.has_value(),
        "[direction] {}: site: expected one of a layer, got {}",
        file,
        printable(name));
  return *found;
}

void add_vector(Direction& direction,
                const std::string& key,
                const at::Tensor& vector,
                const std::string& file) {
  const auto layer = layer_of(key, file);
  check(vector.dim() == 1 && vector.numel() > 0 && at::isFloatingType(vector.scalar_type()),
        "[direction] {}: {}: expected a vector of floats, got {} {}",
        file,
        key,
        c10::toString(vector.scalar_type()),
        shape_str(vector.sizes()));
  const auto value = vector.to(at::kFloat).clone();  // lets go of the file
  check(value.isfinite().all().item<bool>(),
        "[direction] {}: {}: expected finite numbers",
        file,
        key);
  const auto& others = direction.vectors;
  check(others.empty() || others.begin()->second.numel() == value.numel(),
        "[direction] {}: {}: expected {} numbers as in the others, got {}",
        file,
        key,
        others.empty() ? 0 : others.begin()->second.numel(),
        value.numel());
  direction.vectors[layer] = value;
}

Direction from_gguf(const FileBytes& bytes) {
  const GgufFile file(bytes);
  const auto architecture = file.get_string(kArchitecture);
  check(architecture == kControlVector,
        "[direction] {}: {}: expected {}, got {}",
        file.name(),
        kArchitecture,
        kControlVector,
        printable(architecture));
  Direction direction;
  for (const auto& [name, tensor] : file.tensors()) {
    add_vector(direction, name, file.dequantize(name), file.name());
  }
  return direction;
}

Direction from_safetensors(const FileBytes& bytes) {
  Direction direction;
  for (const auto& [name, tensor] : read_safetensors(bytes)) {
    add_vector(direction, name, tensor, bytes.name);
  }
  direction.made = load_safetensors_metadata(bytes.name);
  const auto site = direction.made.find(kSiteKey);
  if (site != direction.made.end()) {
    direction.site = site_of(site->second, bytes.name);
    direction.made.erase(site);
  }
  return direction;
}

void save_gguf(const Direction& direction, const std::string& path) {
  check(direction.site == Site::kResidPost,
        "[direction] {}: llama.cpp adds to resid_post alone, these vectors are of {}. Hint: "
        "safetensors",
        path,
        site_name(direction.site, /*layer=*/-1));
  check(!direction.vectors.contains(0),
        "[direction] {}: llama.cpp has no direction for layer 0. Hint: other layers, or "
        "safetensors",
        path);
  GgufWriter file;
  file.string(kArchitecture, kControlVector);
  file.string("controlvector.model_hint", "gemma3");
  file.i32("controlvector.layer_count", static_cast<int32_t>(direction.vectors.size()));
  for (const auto& [key, value] : direction.made) {
    file.string(std::string(kMadePrefix) + key, value);
  }
  for (const auto& [layer, vector] : direction.vectors) {
    const auto dense = vector.to(at::kCPU, at::kFloat).contiguous();
    const std::string_view content(static_cast<const char*>(dense.const_data_ptr()),
                                   dense.nbytes());
    file.tensor(key_of(layer),
                {static_cast<uint64_t>(dense.numel())},
                static_cast<uint32_t>(GgmlType::kF32),
                content);
  }
  write_file(path, file.bytes());
}

}  // namespace

void check_direction(const Direction& direction, const Gemma3Config& cfg) {
  const auto name = site_name(direction.site, /*layer=*/-1);
  const auto shape = site_shape(direction.site, cfg, /*B=*/1, /*T=*/1);
  check(is_in_layers(direction.site) && shape.size() == 3,
        "[direction] site: expected one of a layer without heads, such as resid_post, got {}",
        name);
  for (const auto& [layer, vector] : direction.vectors) {
    check(layer >= 0 && layer < cfg.n_layers,
          "[direction] layer: expected 0 to {}, got {}",
          cfg.n_layers - 1,
          layer);
    check(vector.dim() == 1 && vector.numel() == shape.back(),
          "[direction] {}: expected ({}), got {}",
          site_name(direction.site, layer),
          shape.back(),
          shape_str(vector.sizes()));
  }
}

void save_direction(const Direction& direction, const std::string& path, DirectionFormat format) {
  check(!direction.vectors.empty(), "[direction] {}: expected a vector, got none", path);
  if (format == DirectionFormat::kControlVector) {
    save_gguf(direction, path);
    return;
  }
  TensorMap tensors;
  for (const auto& [layer, vector] : direction.vectors) {
    tensors[key_of(layer)] = vector.to(at::kFloat);
  }
  auto metadata = direction.made;
  metadata[kSiteKey] = site_name(direction.site, /*layer=*/-1);
  save_safetensors(path, tensors, metadata);
}

Direction load_direction(const std::string& path) {
  const auto bytes = map_file(path);
  const bool gguf = bytes.size >= 4 && std::memcmp(bytes.data, "GGUF", 4) == 0;
  auto direction = gguf ? from_gguf(bytes) : from_safetensors(bytes);
  check(!direction.vectors.empty(),
        "[direction] {}: expected tensors called direction.LAYER, got none",
        path);
  return direction;
}

}  // namespace gemma_torch
