#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>
#include <utility>

#include "gemma_torch/base/error.h"
#include "gemma_torch/io/gguf.h"

namespace gemma_torch {

/// The value at an address of any alignment.
template <typename T>
T read_at(const std::byte* data) {
  T value = {};
  std::memcpy(&value, data, sizeof(T));
  return value;
}

/// Reads forward through the file and never past its end.
struct GgufFile::Cursor {
  const FileBytes& file;
  size_t at = 0;

  const std::byte* take(size_t bytes, const char* what) {
    check(
        bytes <= file.size - at,
        "[gguf] {}: {} at byte {} takes {} bytes, the file has {}. Hint: the file may be cut short",
        file.name,
        what,
        at,
        bytes,
        file.size);
    return file.data + std::exchange(at, at + bytes);
  }

  template <typename T>
  T read(const char* what) {
    return read_at<T>(take(sizeof(T), what));
  }

  std::string_view read_string(const char* what) {
    const auto length = read<uint64_t>(what);
    return {reinterpret_cast<const char*>(take(length, what)), length};
  }

  /// A count of things of which each takes at least `least` bytes of what is left.
  uint64_t read_count(size_t least, const char* what) {
    const auto count = read<uint64_t>(what);
    check(
        count <= (file.size - at) / least,
        "[gguf] {}: {} is {}, more than the file's {} bytes hold. Hint: the file may be cut short",
        file.name,
        what,
        count,
        file.size);
    return count;
  }
};

}  // namespace gemma_torch
