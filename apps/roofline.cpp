#include "roofline.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/ones.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>

#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"

namespace gemma_torch::apps {
namespace {

constexpr int64_t kWords = int64_t{1} << 26;  // of 8 bytes: 512 MiB, far above any cache
constexpr int kPasses = 8;
constexpr int64_t kLanes = 32;  // independent sums, so that the adds wait for memory only

uint64_t sum_range(const int64_t* words, int64_t count) {
  std::array<uint64_t, kLanes> lanes = {};
  for (int64_t i = 0; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[static_cast<size_t>(lane)] += static_cast<uint64_t>(words[i + lane]);
    }
  }
  uint64_t total = 0;
  for (const auto lane : lanes) {
    total += lane;
  }
  return total;
}

int64_t sum_cpu(const at::Tensor& x) {
  const auto* words = x.const_data_ptr<int64_t>();
  const auto parts = static_cast<int64_t>(at::get_num_threads());
  const auto share = kWords / parts / kLanes * kLanes;
  std::atomic<uint64_t> total = 0;
  at::parallel_for(0, parts, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    const auto stop = end == parts ? kWords : end * share;
    total += sum_range(words + begin * share, stop - begin * share);
  });
  return static_cast<int64_t>(total.load());
}

}  // namespace

double read_bandwidth(c10::Device device) {
  const auto x = at::ones({kWords}, at::TensorOptions(at::kLong).device(device));
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    synchronize(device);
    const auto start = std::chrono::steady_clock::now();
    const auto total = device.is_cpu() ? sum_cpu(x) : x.sum().item<int64_t>();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    check(total == kWords,
          "[roofline] sum: expected {}, got {}",
          kWords,
          total);  // every word was read
    best = std::max(best, static_cast<double>(kWords * 8) / seconds.count());
  }
  return best;
}

}  // namespace gemma_torch::apps
