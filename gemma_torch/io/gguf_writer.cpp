#include "gemma_torch/io/gguf_writer.h"

#include <bit>

namespace gemma_torch {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF data is little-endian");

constexpr size_t kAlignment = 32;  // the format's own, where general.alignment is absent

void align(std::string& bytes) {
  bytes.append((kAlignment - bytes.size() % kAlignment) % kAlignment, '\0');
}

}  // namespace

std::string GgufWriter::text(std::string_view value) {
  return raw<uint64_t>(value.size()) + std::string(value);
}

void GgufWriter::value(std::string_view key, uint32_t type, std::string_view payload) {
  values += text(key) + raw(type);
  values += payload;
  ++value_count;
}

void GgufWriter::strings(std::string_view key, const std::vector<std::string>& all) {
  std::string payload = raw(kString) + raw<uint64_t>(all.size());
  for (const auto& one : all) {
    payload += text(one);
  }
  value(key, kArray, payload);
}

void GgufWriter::entry(std::string_view name,
                       const std::vector<uint64_t>& sizes,
                       uint32_t type,
                       uint64_t offset) {
  entries += text(name) + raw<uint32_t>(static_cast<uint32_t>(sizes.size()));
  for (const uint64_t size : sizes) {
    entries += raw(size);
  }
  entries += raw(type) + raw(offset);
  ++tensor_count;
}

void GgufWriter::tensor(std::string_view name,
                        const std::vector<uint64_t>& sizes,
                        uint32_t type,
                        std::string_view content) {
  entry(name, sizes, type, data.size());
  data += content;
  align(data);
}

std::string GgufWriter::bytes() const {
  std::string file = magic + raw(version) + raw(tensor_count) + raw(value_count) + values + entries;
  if (!data.empty()) {
    align(file);
  }
  return file + data;
}

}  // namespace gemma_torch
