#pragma once

#include "gemma_torch/engine/engine.h"

namespace gemma_torch {

/// What engines share that run LibTorch's kernels over a KvCache: the hidden states of the last append are kept, and the
/// head is applied to them when it is asked for.
class HiddenEngine : public Engine {
 public:
  at::Tensor logits(Rows rows) override;
  at::Tensor log_prob(const at::Tensor& targets) override;
  int64_t position() const override { return cache_.position(); }
  const KvCache& cache() const { return cache_; }

 protected:
  HiddenEngine(const Gemma3Config& cfg, const KvCacheOptions& options);

  // What logits() and log_prob() are of from now on: hidden states (B, T, E) of the last append; undefined: of nothing.
  void set_hidden(at::Tensor hidden);

  KvCache cache_;

 private:
  // Hidden states (B, T, E) of ids (B, T), at most a chunk, on the cache's device, which they enter.
  virtual at::Tensor run(const at::Tensor& ids) = 0;
  virtual at::Tensor head(const at::Tensor& x) = 0;  // (B, T, E) -> (B, T, V)
  // Logits (B, T, V) that logits() is about to give, of the tokens before `end`.
  virtual at::Tensor observed(at::Tensor logits, int64_t /*end*/) { return logits; }

  void do_append(const int64_t* ids, int64_t T) override;
  void do_rewind(int64_t position) override;
  void do_reset(const at::Tensor& first) override;
  void do_copy_from(const Engine& other) override;

  at::Tensor hidden_;       // (B, T, E) of the last append; undefined after reset and rewind
  at::Tensor last_logits_;  // (B, 1, V) once asked for: every row of a batch asks anew
};

/// A copy on the device of a tensor on the CPU. The host does not wait for it.
at::Tensor sent(const at::Tensor& tensor, c10::Device device);

/// How many of `left` tokens go into the next pass. With `few_shapes`, powers of two alone: Apple's GPUs keep memory for
/// every shape that they have seen.
int64_t pass_length(int64_t left, int64_t chunk, bool few_shapes);

/// What the kernels of LibTorch on a device are for: "cuda", "mps", and on the CPU `isa`.
std::string kernels_name(c10::Device device, std::string isa);

/// Options of the cache of an engine over weights of this dtype and device; `fixed` as in KvCacheOptions.
KvCacheOptions cache_options(const EngineOptions& options,
                             const at::Tensor& weight,
                             bool fixed = false);

}  // namespace gemma_torch
