#pragma once

#include <deque>
#include <vector>

#include "gemma_torch/adapt/adamw.h"
#include "gemma_torch/adapt/ranks.h"
#include "gemma_torch/model/gemma3.h"

namespace gemma_torch {

/// Sums gradients over ranks, in float32 and in buckets of 4 MiB, while the rest of the backward pass runs: a block's
/// leave when the block is done, what is in no block (norm, embedding) at the end. At most 64 MiB are under way.
class GradientExchange {
 public:
  GradientExchange(const Ranks& ranks, Gemma3Model model, std::vector<TrainedTensor> trained);

  /// The gradients of this block and of those above it are complete.
  void block_done(int64_t layer);
  /// The others are too. Returns once every gradient is the sum over the ranks; one that this rank has not counts as
  /// zero.
  void finish();

  int64_t bytes() const { return bytes_; }  // float32, of all gradients together

 private:
  struct Piece {
    at::Tensor gradient;  // flat, a part of one
    int64_t start;        // in the bucket
  };
  struct Bucket {
    at::Tensor values;  // (kBucket) float32
    int64_t used = 0;
    std::vector<Piece> pieces = {};
    PendingSum sum = {};
  };

  void send_groups(size_t until);
  void put(const at::Tensor& gradient);
  void send_bucket();
  void take_back();  // the one that was sent first

  Ranks ranks_;
  std::vector<TrainedTensor> trained_;
  std::vector<std::vector<size_t>> groups_;  // of trained_, in the order in which they are complete
  size_t sent_ = 0;                          // groups
  int64_t bytes_ = 0;
  Bucket filling_;
  std::deque<Bucket> under_way_;
  std::vector<at::Tensor> spare_;  // values of buckets that are back
};

}  // namespace gemma_torch
