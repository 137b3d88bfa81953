#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace gemma_torch::apps {

/// One way to read memory: a thread reads `streams` places of its share in turn, and asks for what
/// lies `ahead` bytes further on (0: it asks for nothing).
struct Reading {
  int streams = 1;
  int ahead = 0;
  uint64_t (*sum)(const std::byte* data, size_t bytes) = nullptr;
};

/// Every reading, with the widest vector loads of this CPU. Each sums the words of 8 bytes in
/// `bytes`, a multiple of kReadingStep, from an address that is a multiple of 64.
const std::vector<Reading>& readings();
constexpr size_t kReadingStep = 1024;

/// "2 streams, prefetch 1024".
std::string reading_name(const Reading& reading);

}  // namespace gemma_torch::apps
