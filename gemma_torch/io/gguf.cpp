#include "gemma_torch/io/gguf.h"

#include <array>
#include <bit>
#include <limits>
#include <utility>

#include "gemma_torch/io/gguf_cursor.h"

namespace gemma_torch {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF files are read in place");

// Value types of metadata, by their numbers in the file.
enum ValueType : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kFloat32,
  kBoolean,
  kString,
  kArray,
  kU64,
  kI64,
  kFloat64,
  kValueTypes
};
constexpr std::array<const char*, kValueTypes> kTypeNames = {"uint8",
                                                             "int8",
                                                             "uint16",
                                                             "int16",
                                                             "uint32",
                                                             "int32",
                                                             "float32",
                                                             "bool",
                                                             "string",
                                                             "array",
                                                             "uint64",
                                                             "int64",
                                                             "float64"};
// Bytes of one packed element; a string is its length and its bytes.
constexpr std::array<size_t, kValueTypes> kTypeBytes = {1, 1, 2, 2, 4, 4, 4, 1, 8, 0, 8, 8, 8};

constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr uint32_t kVersion = 3;
constexpr uint64_t kDefaultAlignment = 32;
constexpr uint64_t kMaxAlignment = uint64_t{1} << 20;  // bytes
constexpr size_t kMinValueBytes = 8 + 4 + 1;           // name length, type, a byte
constexpr size_t kMinTensorBytes = 8 + 4 + 8 + 4 + 8;  // name length, rank, one size, type, offset

}  // namespace

GgufFile::GgufFile(const std::string& path) : GgufFile(map_file(path)) {}

GgufFile::GgufFile(FileBytes bytes) : file_(std::move(bytes)) {
  parse();
}

void GgufFile::parse() {
  Cursor at{file_};
  const auto magic = at.read<uint32_t>("the magic number");
  check(magic == kMagic, "[gguf] {}: expected a file that begins with GGUF", file_.name);
  const auto version = at.read<uint32_t>("the version");
  check(version == kVersion,
        "[gguf] {}: expected version {}, got {}{}",
        file_.name,
        kVersion,
        version,
        version == __builtin_bswap32(kVersion) ? " (a big-endian file)" : "");
  const auto tensor_count = at.read_count(kMinTensorBytes, "the tensor count");
  const auto value_count = at.read_count(kMinValueBytes, "the metadata count");
  parse_metadata(at, value_count);
  parse_tensors(at, tensor_count);
}

void GgufFile::parse_metadata(Cursor& at, uint64_t count) {
  for (uint64_t i = 0; i < count; ++i) {
    const std::string key(at.read_string("a metadata key"));
    Value value{.type = at.read<uint32_t>("a value type")};
    if (value.type == kArray) {
      value.array = true;
      value.type = at.read<uint32_t>("an element type");
    }
    check(value.type < kValueTypes && value.type != kArray,
          "[gguf] {}: value type {} is not readable ({})",
          printable(key),
          value.type,
          file_.name);
    const size_t bytes = kTypeBytes[value.type];
    if (value.array) {
      value.count = at.read_count(bytes, "an array length");
    }
    value.data = file_.data + at.at;
    if (value.type == kString) {
      for (uint64_t n = 0; n < value.count; ++n) {
        at.read_string("a string");
      }
    } else {
      at.take(value.count * bytes, "a value");
    }
    check(values_.emplace(key, value).second,
          "[gguf] {}: metadata key appears twice ({})",
          printable(key),
          file_.name);
  }
}

uint64_t GgufFile::alignment() const {
  constexpr auto kKey = "general.alignment";
  if (!has(kKey)) {
    return kDefaultAlignment;
  }
  const int64_t stated = get_integer(kKey);
  const auto alignment = static_cast<uint64_t>(stated);
  check(stated > 0 && std::has_single_bit(alignment) && alignment <= kMaxAlignment,
        "[gguf] {}: expected a power of two up to {}, got {} ({})",
        kKey,
        kMaxAlignment,
        stated,
        file_.name);
  return alignment;
}

void GgufFile::wrong_type(const std::string& key, const char* expected) const {
  const Value& value = values_.at(key);
  fail("[gguf] {}: expected {}, got {}{} ({})",
       key,
       expected,
       value.array ? "an array of " : "",
       kTypeNames[value.type],
       file_.name);
}

const GgufFile::Value& GgufFile::value(const std::string& key,
                                       bool array,
                                       const char* expected) const {
  const auto found = values_.find(key);
  check(found != values_.end(), "[gguf] {}: key is missing ({})", key, file_.name);
  if (found->second.array != array) {
    wrong_type(key, expected);
  }
  return found->second;
}

int64_t GgufFile::integer_at(const Value& value, uint64_t i, const std::string& key) const {
  const std::byte* at = value.data + i * kTypeBytes[value.type];
  switch (value.type) {
    case kU8:
      return read_at<uint8_t>(at);
    case kI8:
      return read_at<int8_t>(at);
    case kU16:
      return read_at<uint16_t>(at);
    case kI16:
      return read_at<int16_t>(at);
    case kU32:
      return read_at<uint32_t>(at);
    case kI32:
      return read_at<int32_t>(at);
    case kI64:
      return read_at<int64_t>(at);
    case kU64: {
      const auto wide = read_at<uint64_t>(at);
      check(wide <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()),
            "[gguf] {}: expected less than 2^63, got {} ({})",
            key,
            wide,
            file_.name);
      return static_cast<int64_t>(wide);
    }
    default:
      wrong_type(key, "whole numbers");
  }
}

double GgufFile::number_at(const Value& value, uint64_t i, const std::string& key) const {
  const std::byte* at = value.data + i * kTypeBytes[value.type];
  if (value.type == kFloat32) {
    return std::stod(fmt::format("{}", read_at<float>(at)));
  }
  return value.type == kFloat64 ? read_at<double>(at)
                                : static_cast<double>(integer_at(value, i, key));
}

std::string GgufFile::get_string(const std::string& key) const {
  const Value& found = value(key, /*array=*/false, "a string");
  if (found.type != kString) {
    wrong_type(key, "a string");
  }
  return {reinterpret_cast<const char*>(found.data) + sizeof(uint64_t),
          read_at<uint64_t>(found.data)};
}

int64_t GgufFile::get_integer(const std::string& key) const {
  return integer_at(value(key, /*array=*/false, "a whole number"), 0, key);
}

double GgufFile::get_number(const std::string& key) const {
  return number_at(value(key, /*array=*/false, "a number"), 0, key);
}

bool GgufFile::get_bool(const std::string& key) const {
  const Value& found = value(key, /*array=*/false, "a bool");
  if (found.type != kBoolean) {
    wrong_type(key, "a bool");
  }
  return read_at<uint8_t>(found.data) != 0;
}

bool GgufFile::is_array(const std::string& key) const {
  const auto found = values_.find(key);
  return found != values_.end() && found->second.array;
}

std::vector<std::string> GgufFile::get_strings(const std::string& key) const {
  const Value& found = value(key, /*array=*/true, "an array of strings");
  if (found.type != kString) {
    wrong_type(key, "an array of strings");
  }
  std::vector<std::string> all;
  all.reserve(found.count);
  const std::byte* at = found.data;
  for (uint64_t i = 0; i < found.count; ++i) {
    const auto length = read_at<uint64_t>(at);
    all.emplace_back(reinterpret_cast<const char*>(at) + sizeof(length), length);
    at += sizeof(length) + length;
  }
  return all;
}

std::vector<double> GgufFile::get_numbers(const std::string& key) const {
  const Value& found = value(key, /*array=*/true, "an array of numbers");
  std::vector<double> all(found.count);
  for (uint64_t i = 0; i < found.count; ++i) {
    all[i] = number_at(found, i, key);
  }
  return all;
}

std::vector<int64_t> GgufFile::get_integers(const std::string& key) const {
  const Value& found = value(key, /*array=*/true, "an array of whole numbers");
  std::vector<int64_t> all(found.count);
  for (uint64_t i = 0; i < found.count; ++i) {
    all[i] =
        found.type == kBoolean ? read_at<uint8_t>(found.data + i) != 0 : integer_at(found, i, key);
  }
  return all;
}

}  // namespace gemma_torch
