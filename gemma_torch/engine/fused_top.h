#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "gemma_torch/engine/fused_state.h"

namespace gemma_torch {

constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Scored {
  float score;
  int32_t id;
};

inline bool is_better(const Scored& a, const Scored& b) {
  return a.score != b.score ? a.score > b.score : a.id < b.id;
}

// The n best of what was pushed; `front` is the worst of them.
class Best {
 public:
  explicit Best(size_t n) : n_(n) { heap_.reserve(n); }
  float bar() const { return heap_.size() < n_ ? kNone : heap_.front().score; }
  void push(const Scored& scored) {
    if (heap_.size() == n_) {
      std::pop_heap(heap_.begin(), heap_.end(), is_better);
      heap_.pop_back();
    }
    heap_.push_back(scored);
    std::push_heap(heap_.begin(), heap_.end(), is_better);
  }
  const std::vector<Scored>& all() const { return heap_; }
  void clear() { heap_.clear(); }

 private:
  size_t n_;
  std::vector<Scored> heap_;
};

/// What top(k) keeps from call to call, so that none allocates.
struct FusedEngine::TopState {
  std::vector<QuantizedRows> inputs;            // (B)
  std::vector<kernels::ScanInput> bounds;       // (B)
  std::vector<float> permuted;                  // (E)
  std::vector<std::vector<float>> upper;        // (B) of (V)
  std::vector<std::vector<float>> block_upper;  // (B) of (V / 16)
  std::vector<std::vector<Best>> likely;        // (threads) of (B)
  struct PerThread {
    std::vector<int32_t> blocks, rows;
    std::vector<float> scores;
    std::vector<Scored> scored;
  };
  std::vector<PerThread> threads;
  std::vector<float> first_scores;
  std::vector<Scored> merged;
  int64_t k = 0;
};

}  // namespace gemma_torch
