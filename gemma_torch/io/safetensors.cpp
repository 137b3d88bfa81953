#include "gemma_torch/io/safetensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "gemma_torch/base/error.h"
#include "gemma_torch/io/safetensors_format.h"
#include "gemma_torch/io/strict_json.h"

namespace gemma_torch {
namespace {

using nlohmann::json;
using safetensors::kDtypes;
using safetensors::kMaxHeader;
using safetensors::kMetadataKey;
using safetensors::place;

constexpr uint64_t kLargest = std::numeric_limits<int64_t>::max();
constexpr size_t kMaxRank = 64;  // c10's own limit for views
constexpr int kHeaderDepth = 3;  // {name: {shape: [..]}}

/// One tensor of the header: bytes [begin, end) of the data after the header.
struct Entry {
  std::string name = {};
  at::ScalarType dtype = at::kFloat;
  std::vector<int64_t> shape = {};
  uint64_t begin = 0;
  uint64_t end = 0;
};

struct Header {
  std::vector<Entry> entries = {};  // in the order of their bytes
  Metadata metadata = {};
  size_t data_begin = 0;  // of the data, in the file
};

uint64_t natural(const json& value, const char* what, const std::string& where) {
  check(value.is_number_unsigned() && value.get<uint64_t>() <= kLargest,
        "[load_safetensors] {}: expected a number from 0 to 2^63 - 1 in {}, got {}",
        where,
        what,
        printable(value.dump()));
  return value.get<uint64_t>();
}

at::ScalarType parse_dtype(const json& value, const std::string& where) {
  for (const auto& [name, dtype] : kDtypes) {
    if (value == name) {
      return dtype;
    }
  }
  fail("[load_safetensors] {}: unsupported dtype {}", where, printable(value.dump()));
}

const json& array_field(const json& entry, const char* key, const std::string& where) {
  check(entry.contains(key) && entry[key].is_array(),
        "[load_safetensors] {}: expected an array \"{}\"",
        where,
        key);
  return entry[key];
}

Entry parse_entry(const std::string& name, const json& value, const std::string& file) {
  const auto where = place(name, file);
  check(value.is_object() && value.size() == 3 && value.contains("dtype"),
        "[load_safetensors] {}: expected an object of dtype, shape and data_offsets",
        where);
  Entry entry{.name = name, .dtype = parse_dtype(value["dtype"], where)};
  const auto& shape = array_field(value, "shape", where);
  check(shape.size() <= kMaxRank,
        "[load_safetensors] {}: expected at most {} dimensions, got {}",
        where,
        kMaxRank,
        shape.size());
  uint64_t most =
      c10::elementSize(entry.dtype);  // bytes with sizes of 0 taken as 1: strides must fit too
  bool empty = false;
  for (const auto& size : shape) {
    const uint64_t n = natural(size, "shape", where);
    entry.shape.push_back(static_cast<int64_t>(n));
    empty = empty || n == 0;
    check(!__builtin_mul_overflow(most, std::max<uint64_t>(n, 1), &most) && most <= kLargest,
          "[load_safetensors] {}: shape {} has more than 2^63 bytes",
          where,
          shape_str(entry.shape));
  }
  const uint64_t bytes = empty ? 0 : most;
  const auto& offsets = array_field(value, "data_offsets", where);
  check(offsets.size() == 2, "[load_safetensors] {}: expected two data_offsets", where);
  entry.begin = natural(offsets[0], "data_offsets", where);
  entry.end = natural(offsets[1], "data_offsets", where);
  check(entry.begin <= entry.end && entry.end - entry.begin == bytes,
        "[load_safetensors] {}: expected {} bytes for {} {}, data_offsets are [{}, {}]",
        where,
        bytes,
        c10::toString(entry.dtype),
        shape_str(entry.shape),
        entry.begin,
        entry.end);
  return entry;
}

Metadata parse_metadata(const json& value, const std::string& file) {
  check(value.is_object(), "[load_safetensors] __metadata__: expected an object ({})", file);
  Metadata metadata;
  for (const auto& [key, text] : value.items()) {
    check(text.is_string(),
          "[load_safetensors] __metadata__: expected a string for {}",
          place(key, file));
    metadata[key] = text.get<std::string>();
  }
  return metadata;
}

/// The data must be covered once, without overlap and without a gap.
void check_layout(std::vector<Entry>& entries, uint64_t data_size, const std::string& file) {
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  uint64_t covered = 0;
  for (const auto& entry : entries) {
    check(entry.begin == covered,
          "[load_safetensors] {}: expected its data at {}, where the previous tensor ends, got {}",
          place(entry.name, file),
          covered,
          entry.begin);
    check(
        entry.end <= data_size,
        "[load_safetensors] {}: its data ends at {}, the file has {} bytes of data. Hint: the file "
        "may be cut short",
        place(entry.name, file),
        entry.end,
        data_size);
    covered = entry.end;
  }
  check(covered == data_size,
        "[load_safetensors] {}: {} bytes of data, tensors cover {}",
        file,
        data_size,
        covered);
}

Header parse_header(const FileBytes& file) {
  uint64_t length = 0;
  check(file.size >= sizeof(length),
        "[load_safetensors] {}: {} bytes, too short for a safetensors file",
        file.name,
        file.size);
  std::memcpy(&length, file.data, sizeof(length));
  check(length <= kMaxHeader && length <= file.size - sizeof(length),
        "[load_safetensors] {}: header length {}, the file has {} bytes and headers at most {}. "
        "Hint: "
        "is it a safetensors file?",
        file.name,
        length,
        file.size,
        kMaxHeader);
  const std::string_view text(reinterpret_cast<const char*>(file.data) + sizeof(length), length);
  check(text.starts_with('{'), "[load_safetensors] {}: header does not begin with {{", file.name);
  const json root = parse_strict_json(text, kHeaderDepth, file.name);
  Header header{.data_begin = sizeof(length) + length};
  for (const auto& [name, value] : root.items()) {
    if (name == kMetadataKey) {
      header.metadata = parse_metadata(value, file.name);
    } else {
      header.entries.push_back(parse_entry(name, value, file.name));
    }
  }
  check_layout(header.entries, file.size - header.data_begin, file.name);
  return header;
}

at::Tensor tensor_over(const FileBytes& file, const Header& header, const Entry& entry) {
  const size_t bytes = entry.end - entry.begin;
  if (bytes == 0) {
    return at::empty(entry.shape, entry.dtype);
  }
  std::byte* data = file.data + header.data_begin + entry.begin;
  if (entry.dtype == at::kBool) {
    const auto* begin = reinterpret_cast<const unsigned char*>(data);
    check(std::all_of(begin, begin + bytes, [](unsigned char b) { return b <= 1; }),
          "[load_safetensors] {}: expected bytes 0 and 1 in a BOOL tensor",
          place(entry.name, file.name));
  }
  if (reinterpret_cast<uintptr_t>(data) % c10::elementSize(entry.dtype) != 0) {
    auto copy = at::empty(entry.shape, entry.dtype);
    std::memcpy(copy.data_ptr(), data, bytes);
    return copy;
  }
  return at::from_blob(data, entry.shape, [owner = file.owner](void*) {}, entry.dtype);
}

}  // namespace

TensorMap read_safetensors(const FileBytes& file) {
  const Header header = parse_header(file);
  TensorMap tensors;
  for (const auto& entry : header.entries) {
    tensors.emplace(entry.name, tensor_over(file, header, entry));
  }
  return tensors;
}

TensorMap load_safetensors(const std::string& path) {
  return read_safetensors(map_file(path));
}

Metadata load_safetensors_metadata(const std::string& path) {
  return parse_header(map_file(path)).metadata;
}

}  // namespace gemma_torch
