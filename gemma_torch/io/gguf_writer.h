#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace gemma_torch {

/// A GGUF file of version 3, put together in memory: for the small files that this library writes.
/// Its parts are plain members, so that a test can also write one that lies about a count.
/// Source:  the format's description (ggml-org/ggml, docs/gguf.md).
class GgufWriter {
 public:
  // Value types of the format.
  static constexpr uint32_t kU32 = 4, kI32 = 5, kF32 = 6, kBool = 7, kString = 8, kArray = 9,
                            kU64 = 10;

  /// The bytes of a number, and of a string with its length before it.
  template <typename T>
  static std::string raw(T value) {
    return {reinterpret_cast<const char*>(&value), sizeof(value)};
  }
  static std::string text(std::string_view value);

  /// A metadata value of any type number and payload.
  void value(std::string_view key, uint32_t type, std::string_view payload);
  void u32(std::string_view key, uint32_t number) { value(key, kU32, raw(number)); }
  void i32(std::string_view key, int32_t number) { value(key, kI32, raw(number)); }
  void f32(std::string_view key, float number) { value(key, kF32, raw(number)); }
  void string(std::string_view key, std::string_view content) {
    value(key, kString, text(content));
  }
  void strings(std::string_view key, const std::vector<std::string>& all);
  template <typename T>
  void array(std::string_view key, uint32_t type, const std::vector<T>& all) {
    std::string payload = raw(type) + raw<uint64_t>(all.size());
    for (const T one : all) {
      payload += raw(one);
    }
    value(key, kArray, payload);
  }

  /// A tensor's entry; `sizes` as the file has them, row length first.
  void entry(std::string_view name,
             const std::vector<uint64_t>& sizes,
             uint32_t type,
             uint64_t offset);
  /// An entry, and its bytes at the end of the data.
  void tensor(std::string_view name,
              const std::vector<uint64_t>& sizes,
              uint32_t type,
              std::string_view content);

  /// The whole file.
  std::string bytes() const;

  std::string magic = "GGUF";
  uint32_t version = 3;
  uint64_t tensor_count = 0;
  uint64_t value_count = 0;
  std::string values = {};   // the metadata, packed
  std::string entries = {};  // of the tensors, packed
  std::string data = {};
};

}  // namespace gemma_torch
