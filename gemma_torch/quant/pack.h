#pragma once

#include <array>
#include <memory>
#include <vector>

#include "gemma_torch/kernels/cpu/packed.h"
#include "gemma_torch/quant/scanned_head.h"

namespace gemma_torch {

/// A matrix (rows, columns) cut into one part for each thread, by rows or by columns; `begin` has where they begin, and
/// the end of the last. There are empty ones if there are more threads than things to share.
struct PackedParts {
  enum class Cut : uint8_t { kRows, kColumns };
  Cut cut = Cut::kRows;
  int64_t rows = 0, columns = 0;
  std::vector<kernels::Packed> parts;  // (threads)
  std::vector<int64_t> begin;          // (threads + 1) rows or columns

  int64_t blocks() const { return rows / kernels::kBlockRows; }
  /// The part that has a row or column.
  size_t part_of(int64_t at) const;
};

/// One layer's weights as the fused kernels read them.
struct LayerPack {
  std::array<PackedParts, 3> qkv;  // queries, keys and values, cut by rows, 32 at a time
  PackedParts out;                 // out_proj, cut by columns, 64 at a time
  PackedParts gate_up;             // 16 rows of fc1 and 16 of fc2 by turns, cut where `down` is
  PackedParts down;                // fc3, cut by columns, 64 at a time
  // 1 + weight, float32
  const float *input_norm, *post_attn_norm, *pre_ff_norm, *post_ff_norm;  // (E)
  const float *q_norm, *k_norm;  // (D); null without qk_norm
};

/// A model's weights on 2 MiB pages, made from its parameters: bfloat16 ones become kLossless12, bit for bit, or are
/// rounded to kInt8 where asked; packed ones (PackedLinear) are copied. Each thread's parts of all matrices follow one
/// another in execution order: what fetches ahead for it then goes on from one to the next, where it takes some 20 KB
/// to come up to speed in a new place. The embedding, row-major, is the model's own.
class Pack {
 public:
  /// threads: how many share each matrix. Throws: Error if the model has what the kernels do not take (sizes, dtype,
  /// device), naming it.
  Pack(Gemma3Model model, kernels::Format format, int threads);

  /// Empty, or why the fused engine cannot run this model.
  static std::string refusal(const Gemma3Model& model);

  const std::vector<LayerPack>& layers() const { return layers_; }
  const float* final_norm() const { return final_norm_; }
  const kernels::Bf16* embedding() const;  // (V, E)
  const kernels::Bf16* head() const;       // (V, E), the same where tied
  kernels::HeadScan scan() const { return scan_.view(); }
  int64_t layer_bytes() const { return layer_bytes_; }   // what one token reads of the layers
  const std::string& format() const { return format_; }  // "lossless12", or a recipe's name

  int threads() const { return static_cast<int>(streams_.size()); }

  /// Whether Pack(model, format, threads) would make the same.
  bool fits(const Gemma3Model& model, kernels::Format format, int threads) const;

  /// Whether the model's parameters are still those that were packed.
  bool is_current() const;

 private:
  struct Source;
  PackedParts add(const Source& source);
  const float* add_norm(const torch::Tensor& weight);
  void remember(const torch::Tensor& parameter);

  Gemma3Model model_;
  std::vector<LayerPack> layers_;
  const float* final_norm_ = nullptr;
  ScanTensors scan_;
  int64_t layer_bytes_ = 0;
  kernels::Format asked_;  // of weights that are not packed yet
  std::string format_;
  std::shared_ptr<std::byte> arena_;
  std::vector<uint8_t*> streams_;  // (threads) where the next part goes
  std::vector<std::vector<kernels::Exception>> exceptions_;
  std::vector<std::vector<float>> norms_;
  struct Seen {
    torch::Tensor parameter;
    const void* storage;
    int64_t offset;
    uint32_t version;
  };
  std::vector<Seen> seen_;
};

}  // namespace gemma_torch
