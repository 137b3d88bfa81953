#pragma once

#include <memory>
#include <span>
#include <vector>

#include "gemma_torch/engine/engine.h"
#include "gemma_torch/engine/kernel_clock.h"
#include "gemma_torch/kernels/cpu/head_scan.h"
#include "gemma_torch/kernels/team.h"
#include "gemma_torch/quant/pack.h"

namespace gemma_torch {

/// The whole model in a few kernels over a Pack, on the CPU. Weights as they are (bfloat16 bit for bit, or codes),
/// everything else in float32, but for keys and values and the queries and weights that meet them (kv_dtype, bfloat16 by
/// default) and the products of more than kMaxRows tokens (products, bfloat16 by default where the CPU has an instruction
/// for it).
class FusedEngine : public Engine {
 public:
  FusedEngine(Gemma3Model model, const EngineOptions& options);
  ~FusedEngine() override;

  at::Tensor logits(Rows rows) override;
  at::Tensor log_prob(const at::Tensor& targets) override;
  int64_t position() const override { return cache_.position(); }
  EngineReport report(int64_t depth) const override;
  std::vector<KernelTime> profile() const override { return clock_.times(); }
  void reset_profile() override { clock_.reset(); }

  /// Rows that the last top() scored exactly, summed over the batch; 0 if it went through the full head.
  int64_t survivors() const { return survivors_; }

 private:
  void do_append(const int64_t* ids, int64_t T) override;
  void do_top(int64_t k, std::vector<Candidate>& best) override;
  void do_rewind(int64_t position) override;
  void do_reset(const at::Tensor& first) override;
  void do_copy_from(const Engine& other) override;

  // One pass of the model: T tokens for each of B rows, from column `start` of ids (B, all).
  struct Pass {
    const int64_t* ids;
    int64_t ids_stride, T, position;
    int64_t rows(int64_t batch) const { return batch * T; }
  };
  struct Worker;
  struct Buffers;
  struct Chunks;
  template <typename T>
  struct Chunk;

  // The keys that the queries of a pass see in one layer: positions from `low` on.
  struct KeySpan {
    int64_t low, count, padded;
  };

  void ensure_current();
  void repack();
  void fill_angles(const Pass& pass, int i);
  void embed(const Pass& pass, int64_t row, float* x) const;
  bool is_full(int64_t layer) const;
  int64_t qkv_width() const;

  // fused_decode.cpp: up to kMaxRows tokens
  void run_rows(const Pass& pass, float* hidden);
  void rows_worker(const Pass& pass, float* hidden, int i);
  void multiply_qkv(const LayerPack& layer, int64_t rows, Worker& worker, int i);
  void sum_parts(std::span<float> Worker::* part, int64_t rows, const float* norm, Worker& worker);

  // fused_prefill.cpp: more
  void run_chunk(const Pass& pass, float* hidden);
  template <typename T>
  void chunk_worker(const Pass& pass, float* hidden, Chunk<T>& chunk, int i);

  // fused_attention.cpp
  void make_heads(int64_t layer,
                  int64_t t,
                  const float* from,
                  const float* norm,
                  int64_t count,
                  float* to) const;
  void make_queries(int64_t layer, int64_t t, const float* qkv, float* q) const;
  void make_keys(int64_t layer, int64_t t, const float* qkv, float* k) const;
  kernels::Range seen_positions(bool full, int64_t b, int64_t position) const;
  void* pairs_of(int64_t layer, int64_t owner, int64_t slot);
  void store_key_value(
      int64_t layer, int64_t b, int64_t position, const float* key, const float* value);
  const float* gather_qkv(int64_t layer, int64_t row, bool keys, Worker& worker);
  void row_attention(const Pass& pass, int64_t layer, Worker& worker, int i);
  void merge_attention(const Pass& pass, kernels::Range columns, Worker& worker);
  KeySpan key_span(const Pass& pass, bool full) const;
  template <typename T>
  void place_token(const Pass& pass, int64_t layer, int64_t row, Chunk<T>& chunk, int i);
  template <typename T>
  void make_panels(int64_t layer, const KeySpan& span, int64_t unit, Chunk<T>& chunk);
  template <typename T>
  void attend_unit(
      const Pass& pass, int64_t layer, const KeySpan& span, int64_t unit, Chunk<T>& chunk, int i);

  // fused_head.cpp
  struct TopThread;
  struct TopState;
  void normalize(int64_t row, float* to) const;
  void normalize_last();
  TopState& prepare_top(int64_t k);
  void scan_share(int i);
  void score_share(size_t b, int i);
  void score_likely(size_t b, int i);
  void find_rows(size_t b, float bar, int i);
  void score_found(size_t b, float bar, int i);
  void score_rows(size_t b, const int32_t* rows, size_t count, float bar, TopThread& own);
  bool scan_top(int64_t k, std::vector<Candidate>& best);
  void full_logits(const float* x, int64_t count, float* y);

  EngineOptions options_;
  Gemma3Model model_;
  const kernels::FusedKernels& kernel_;
  bool bf16_products_;
  std::shared_ptr<const Pack> pack_;
  kernels::Format format_;
  kernels::Team team_;
  KvCache cache_;
  KernelClock clock_;
  std::vector<int64_t> first_;      // (B) left padding
  std::vector<float> inv_freq_[2];  // sliding, full: (D / 2) radians a position
  std::unique_ptr<Buffers> buffers_;
  std::unique_ptr<TopState> top_;
  std::unique_ptr<Chunks> chunks_;
  std::vector<float> hidden_;  // (B, T, E) of the last append, before final_norm
  int64_t hidden_tokens_ = 0;  // T; 0 after reset and rewind
  std::vector<float> last_;    // (B, E) after final_norm; empty until asked for
  at::Tensor last_logits_;
  int64_t survivors_ = 0;
};

}  // namespace gemma_torch
