#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace gemma_torch {

/// A short name for data, to tell whether two are the same: FNV-1a, 64 bits. No protection against
/// anyone who wants them to look the same.
class Fingerprint {
 public:
  void add(const void* data, size_t bytes) {
    const auto* at = static_cast<const unsigned char*>(data);
    for (size_t i = 0; i < bytes; ++i) {
      state_ = (state_ ^ at[i]) * 0x100000001b3U;
    }
  }
  void add(std::string_view text) {
    add(text.data(), text.size());
    add("", 1);  // where it ends
  }
  void add(int64_t number) { add(&number, sizeof number); }
  void add(const std::vector<int64_t>& numbers) {
    add(static_cast<int64_t>(numbers.size()));
    add(numbers.data(), numbers.size() * sizeof(int64_t));
  }
  uint64_t value() const { return state_; }
  std::string hex() const { return fmt::format("{:016x}", state_); }

 private:
  uint64_t state_ = 0xcbf29ce484222325U;
};

}  // namespace gemma_torch
