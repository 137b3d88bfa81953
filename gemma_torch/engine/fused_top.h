#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "gemma_torch/engine/fused_state.h"
#include "gemma_torch/kernels/shares.h"

namespace gemma_torch {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// The n best of what was pushed; `front` is the worst of them.
class Best {
 public:
  void restart(size_t n) {
    n_ = n;
    heap_.clear();
    heap_.reserve(n);
  }
  float bar() const { return heap_.size() < n_ ? kNone : heap_.front().logit; }
  void push(const Candidate& scored) {
    if (heap_.size() == n_) {
      std::pop_heap(heap_.begin(), heap_.end(), is_better);
      heap_.pop_back();
    }
    heap_.push_back(scored);
    std::push_heap(heap_.begin(), heap_.end(), is_better);
  }
  const std::vector<Candidate>& all() const { return heap_; }

 private:
  size_t n_ = 0;
  std::vector<Candidate> heap_;
};

/// What one thread keeps of top(k).
struct FusedEngine::TopThread {
  std::vector<int32_t> blocks, rows;  // as long as they ever get; the first ones count
  std::vector<float> upper, scores;
  std::vector<Candidate> likely, scored;
  size_t found = 0;       // rows of this thread's blocks that may be among the best
  int64_t survivors = 0;  // rows that it scored
};

/// What top(k) keeps from call to call, so that none allocates.
struct FusedEngine::TopState {
  explicit TopState(const kernels::Team& team) : parts(team), pieces(team) {}

  kernels::Shares parts;                     // of the scan
  kernels::Shares pieces;                    // of the rows found
  std::vector<QuantizedRows> inputs;         // (B)
  std::vector<kernels::ScanInput> bounds;    // (B)
  std::vector<std::vector<int8_t>> planes;   // (B) of (2, plane_bytes)
  std::vector<std::vector<float>> permuted;  // (B) of (E), columns in the order of the scan
  at::Tensor upper;  // (B, V) float32, on large pages: what is looked at of it stands anywhere
  std::vector<std::vector<float>> block_upper;  // (B) of (V / 16)
  std::vector<std::vector<Best>> likely;        // (threads) of (B)
  std::vector<TopThread> threads;
  std::vector<float> first_scores;  // (likely_rows)
  std::vector<Candidate> merged;
  size_t most_scored = 0;              // rows: reading the full head in order takes no longer
  std::atomic<size_t> scored_rows{0};  // by all threads, not counting those that were scored first
  int64_t most_pieces = 0;             // that a thread can offer
  int64_t k = 0;                       // of this call
  size_t likely_rows = 0;              // of this call: rows that are scored first

  float* upper_of(size_t b) {
    return upper.mutable_data_ptr<float>() + static_cast<int64_t>(b) * upper.size(1);
  }
};

}  // namespace gemma_torch
