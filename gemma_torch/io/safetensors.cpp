#include "gemma_torch/io/safetensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/io/strict_json.h"

namespace gemma_torch {
namespace {

using nlohmann::json;
static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian");

constexpr uint64_t kMaxHeader = 100'000'000;  // bytes; the limit of the reference implementation
constexpr uint64_t kLargest = std::numeric_limits<int64_t>::max();
constexpr size_t kMaxRank = 64;  // c10's own limit for views
constexpr int kHeaderDepth = 3;  // {name: {shape: [..]}}
constexpr auto kMetadataKey = "__metadata__";

struct DtypeName {
  const char* name;
  at::ScalarType dtype;
};
constexpr std::array<DtypeName, 15> kDtypes = {{{"F64", at::kDouble},
                                                {"F32", at::kFloat},
                                                {"F16", at::kHalf},
                                                {"BF16", at::kBFloat16},
                                                {"I64", at::kLong},
                                                {"I32", at::kInt},
                                                {"I16", at::kShort},
                                                {"I8", at::kChar},
                                                {"U64", at::kUInt64},
                                                {"U32", at::kUInt32},
                                                {"U16", at::kUInt16},
                                                {"U8", at::kByte},
                                                {"BOOL", at::kBool},
                                                {"F8_E4M3", at::kFloat8_e4m3fn},
                                                {"F8_E5M2", at::kFloat8_e5m2}}};

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

/// "embed.weight (model.safetensors)": where an error is.
std::string place(const std::string& name, const std::string& file) {
  return fmt::format("{} ({})", printable(name), file);
}

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

const char* dtype_name(const at::Tensor& tensor, const std::string& where) {
  for (const auto& [name, dtype] : kDtypes) {
    if (tensor.scalar_type() == dtype) {
      return name;
    }
  }
  fail("[save_safetensors] {}: dtype {} has no safetensors form",
       where,
       c10::toString(tensor.scalar_type()));
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

void save_safetensors(const std::string& path, const TensorMap& tensors, const Metadata& metadata) {
  std::vector<std::pair<std::string, at::Tensor>> order(tensors.begin(), tensors.end());
  for (const auto& [name, tensor] : order) {
    check(tensor.defined() && tensor.layout() == at::kStrided && name != kMetadataKey,
          "[save_safetensors] {}: expected a name and a dense tensor",
          place(name, path));
  }
  // Widest first keeps every tensor aligned to its dtype.
  std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return a.second.element_size() > b.second.element_size();
  });
  json root = json::object();
  if (!metadata.empty()) {
    root[kMetadataKey] = metadata;
  }
  size_t end = 0;
  for (const auto& [name, tensor] : order) {
    const size_t begin = std::exchange(end, end + tensor.nbytes());
    root[name] = {{"dtype", dtype_name(tensor, place(name, path))},
                  {"shape", tensor.sizes().vec()},
                  {"data_offsets", {begin, end}}};
  }
  std::string header;
  try {
    header = root.dump();
  } catch (const json::exception& error) {
    fail("[save_safetensors] {} ({})", printable(error.what()), path);
  }
  constexpr size_t kAlignment = 64;  // the format asks for 8; vector loads like 64
  uint64_t length = header.size();
  length += (kAlignment - (sizeof(length) + length) % kAlignment) % kAlignment;
  header.resize(length, ' ');
  AtomicFile file(path);
  file.write(&length, sizeof(length));
  file.write(header.data(), header.size());
  for (const auto& [name, tensor] : order) {
    const auto dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous();
    file.write(dense.data_ptr(), dense.nbytes());
  }
  file.commit();
}

}  // namespace gemma_torch
