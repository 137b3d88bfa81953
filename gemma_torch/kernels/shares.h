#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "gemma_torch/kernels/team.h"

namespace gemma_torch::kernels {

/// A job of many parts for a team. Each thread has a share of its own, which it takes from front to back, so that it
/// reads memory in order; who has none left takes from the back of the fullest other share, so that all end together
/// however fast each was. Every part is taken once.
class Shares {
 public:
  explicit Shares(const Team& team) : team_(team), shares_(static_cast<size_t>(team.size())) {}

  /// Before the team's run: parts 0 .. parts - 1 (below 2^32), shared out evenly.
  void start(int64_t parts) {
    for (int i = 0; i < team_.size(); ++i) {
      const auto even = team_.share(parts, i);
      offer(i, even.begin, even.end);
    }
  }

  /// Or within it, each thread its own share before a barrier: parts begin .. end - 1, of numbers that no other has.
  void offer(int i, int64_t begin, int64_t end) {
    auto& share = shares_[static_cast<size_t>(i)];
    share.begin = begin;
    share.end = end;
    share.taken.store(0, std::memory_order_relaxed);
  }

  /// Within it: a part for thread i, or -1 where none is left.
  int64_t next(int i) {
    auto* share = &shares_[static_cast<size_t>(i)];
    auto taken = share->taken.fetch_add(kFront, std::memory_order_relaxed);
    if (share->left(taken) > 0) {
      return share->begin + static_cast<int64_t>(taken % kBack);
    }
    for (;;) {
      int64_t most = 0;
      for (auto& other : shares_) {
        const auto left = other.left(other.taken.load(std::memory_order_relaxed));
        if (left > most) {
          most = left;
          share = &other;
        }
      }
      if (most == 0) {
        return -1;
      }
      taken = share->taken.fetch_add(kBack, std::memory_order_relaxed);
      if (share->left(taken) > 0) {  // else another thread was faster
        return share->end - 1 - static_cast<int64_t>(taken / kBack);
      }
    }
  }

 private:
  static constexpr uint64_t kFront = 1, kBack = uint64_t{1} << 32;

  struct alignas(64) Share {
    std::atomic<uint64_t> taken{0};  // from the front, and 2^32 times how many from the back
    int64_t begin = 0, end = 0;

    int64_t left(uint64_t what) const {
      return end - begin - static_cast<int64_t>(what % kBack) - static_cast<int64_t>(what / kBack);
    }
  };
  const Team& team_;
  std::vector<Share> shares_;
};

}  // namespace gemma_torch::kernels
