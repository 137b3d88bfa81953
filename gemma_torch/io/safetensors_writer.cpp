#include "gemma_torch/io/safetensors_writer.h"

#include <algorithm>
#include <utility>

#include "gemma_torch/base/error.h"
#include "gemma_torch/io/safetensors_format.h"
#include "gemma_torch/io/strict_json.h"

namespace gemma_torch {
namespace {

using nlohmann::json;
using safetensors::kMetadataKey;
using safetensors::place;

const char* dtype_name(const TensorSpec& spec, const std::string& path) {
  for (const auto& [name, dtype] : safetensors::kDtypes) {
    if (spec.dtype == dtype) {
      return name;
    }
  }
  fail("[save_safetensors] {}: dtype {} has no safetensors form",
       place(spec.name, path),
       c10::toString(spec.dtype));
}

uint64_t size_of(const TensorSpec& spec) {
  uint64_t bytes = c10::elementSize(spec.dtype);
  for (const auto size : spec.shape) {
    bytes *= static_cast<uint64_t>(size);
  }
  return bytes;
}

json describe(const std::vector<TensorSpec>& specs, const std::string& path) {
  json root = json::object();
  uint64_t end = 0;
  size_t width = 16;  // of the widest dtype
  for (const auto& spec : specs) {
    const auto where = place(spec.name, path);
    check(spec.name != kMetadataKey, "[save_safetensors] {}: expected a tensor's name", where);
    check(!root.contains(spec.name), "[save_safetensors] {}: appears twice", where);
    check(c10::elementSize(spec.dtype) <= width,
          "[save_safetensors] {}: expected the widest dtypes first, got {} after one of {} bytes",
          where,
          c10::toString(spec.dtype),
          width);
    width = c10::elementSize(spec.dtype);
    const auto begin = std::exchange(end, end + size_of(spec));
    root[spec.name] = {
        {"dtype", dtype_name(spec, path)}, {"shape", spec.shape}, {"data_offsets", {begin, end}}};
  }
  return root;
}

std::string make_header(const std::vector<TensorSpec>& specs,
                        const Metadata& metadata,
                        const std::string& path) {
  auto root = describe(specs, path);
  if (!metadata.empty()) {
    root[kMetadataKey] = metadata;
  }
  std::string header;
  try {
    header = root.dump();
  } catch (const json::exception& error) {
    fail("[save_safetensors] {} ({})", printable(error.what()), path);
  }
  constexpr size_t kAlignment = 64;  // the format asks for 8; vector loads like 64
  const auto length = sizeof(uint64_t) + header.size();
  header.append((kAlignment - length % kAlignment) % kAlignment, ' ');
  check(header.size() <= safetensors::kMaxHeader,
        "[save_safetensors] {}: expected a header of at most {} bytes, {} tensors take {}",
        path,
        safetensors::kMaxHeader,
        specs.size(),
        header.size());
  return header;
}

}  // namespace

SafetensorsWriter::SafetensorsWriter(const std::string& path,
                                     const std::vector<TensorSpec>& specs,
                                     const Metadata& metadata,
                                     Unfinished unfinished)
    : path_(path), specs_(specs) {
  const auto header = make_header(specs, metadata, path);
  const uint64_t length = header.size();
  file_.emplace(path, unfinished);
  file_->write(&length, sizeof(length));
  file_->write(header.data(), length);
  bytes_ = sizeof(length) + length;
}

uint64_t SafetensorsWriter::left_of(const std::string& name) const {
  check(next_ < specs_.size() && specs_[next_].name == name,
        "[save_safetensors] {}: expected {}",
        place(name, path_),
        next_ < specs_.size() ? specs_[next_].name : "nothing more");
  return size_of(specs_[next_]) - written_;
}

void SafetensorsWriter::advance(uint64_t bytes) {
  bytes_ += bytes;
  written_ += bytes;
  if (written_ == size_of(specs_[next_])) {
    ++next_;
    written_ = 0;
  }
}

void SafetensorsWriter::write(const std::string& name, const at::Tensor& values) {
  const auto left = left_of(name);
  const auto& spec = specs_[next_];
  check(values.scalar_type() == spec.dtype && values.nbytes() <= left,
        "[save_safetensors] {}: expected {} values of {}, got {} of {}",
        place(name, path_),
        left / c10::elementSize(spec.dtype),
        c10::toString(spec.dtype),
        values.numel(),
        c10::toString(values.scalar_type()));
  const auto dense = values.detach().cpu().resolve_conj().resolve_neg().contiguous();
  file_->write(dense.data_ptr(), dense.nbytes());
  advance(dense.nbytes());
}

void SafetensorsWriter::skip(const std::string& name, int64_t count) {
  const auto left = left_of(name);
  const auto width = c10::elementSize(specs_[next_].dtype);
  check(count >= 0 && static_cast<uint64_t>(count) <= left / width,
        "[save_safetensors] {}: expected to leave out at most {} values, got {}",
        place(name, path_),
        left / width,
        count);
  const auto bytes = static_cast<uint64_t>(count) * width;
  file_->skip(bytes);
  advance(bytes);
}

void SafetensorsWriter::commit() {
  check(next_ == specs_.size(),
        "[save_safetensors] {}: expected its values, got none or not all",
        place(next_ == specs_.size() ? "" : specs_[next_].name, path_));
  file_->commit();
}

void save_safetensors(const std::string& path, const TensorMap& tensors, const Metadata& metadata) {
  std::vector<TensorSpec> specs;
  for (const auto& [name, tensor] : tensors) {
    check(tensor.defined() && tensor.layout() == at::kStrided,
          "[save_safetensors] {}: expected a dense tensor",
          place(name, path));
    specs.push_back({name, tensor.scalar_type(), tensor.sizes().vec()});
  }
  // Widest first keeps every tensor aligned to its dtype.
  std::stable_sort(specs.begin(), specs.end(), [](const TensorSpec& a, const TensorSpec& b) {
    return c10::elementSize(a.dtype) > c10::elementSize(b.dtype);
  });
  SafetensorsWriter writer(path, specs, metadata);
  for (const auto& spec : specs) {
    writer.write(spec.name, tensors.at(spec.name));
  }
  writer.commit();
}

}  // namespace gemma_torch
