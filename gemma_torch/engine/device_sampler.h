#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "gemma_torch/engine/sampling.h"

namespace gemma_torch {

/// Tokens of each row, best first, the lower id of equals first.
struct Ranked {
  at::Tensor ids;     // (B, k) int64
  at::Tensor logits;  // (B, k) float32
};

/// The k best of logits (B, V) float32, k at most V, on their device; the host waits for nothing.
Ranked best_of(const at::Tensor& logits, int64_t k);

/// Chooses tokens on the device, by operations alone, so that a recorded graph can hold them. With the same numbers of
/// Draws it chooses what draw() chooses from candidates().
class DeviceSampler {
 public:
  /// Throws: Error if a field of `sampling` is out of range.
  DeviceSampler(const Sampling& sampling, int64_t batch, int64_t vocab_size, c10::Device device);

  /// Starts anew with the tokens that each row holds, for the repetition penalty.
  void see(const std::vector<std::vector<int64_t>>& histories);

  /// Ids (B, 1) int64 on the device are among what is seen from now on.
  void append(const at::Tensor& ids);

  /// Ids (B) int64 from logits (B, V) float32 and one number of Draws a row, places (B) float64, all on the device.
  /// -1 for a row where more tokens equal the last one that counts than are looked at: to be chosen by the host.
  at::Tensor choose(const at::Tensor& logits, const at::Tensor& places) const;

  /// What append() changes, (B, V) bool; undefined where there is no penalty.
  const at::Tensor& seen() const { return seen_; }

 private:
  at::Tensor penalised(const at::Tensor& logits) const;
  at::Tensor shares_of(const at::Tensor& logits) const;

  Sampling sampling_;
  int64_t looked_at_ = 1;  // best tokens of a row
  at::Tensor temperature_,
      penalty_;  // scalars, on the device: division by them rounds as the host's does
  at::Tensor seen_;
};

}  // namespace gemma_torch
