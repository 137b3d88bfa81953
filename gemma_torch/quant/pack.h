#pragma once

#include <array>
#include <memory>
#include <vector>

#include "gemma_torch/kernels/cpu/packed.h"
#include "gemma_torch/quant/scanned_head.h"

namespace gemma_torch {

/// One layer's weights as the fused kernels read them.
struct LayerPack {
  std::array<kernels::Packed, 3> qkv;  // queries, keys and values, one slice each
  kernels::Packed out;                 // out_proj, slices of 64 columns
  kernels::Packed gate_up;             // 16 rows of fc1 and 16 of fc2 by turns, one slice
  kernels::Packed down;                // fc3, slices of 64 columns
  // 1 + weight, float32
  const float *input_norm, *post_attn_norm, *pre_ff_norm, *post_ff_norm;  // (E)
  const float *q_norm, *k_norm;  // (D); null without qk_norm
};

/// A model's weights in execution order on 2 MiB pages, made from its parameters: bfloat16 ones become kLossless12,
/// bit for bit, or are rounded to kInt8 where asked; packed ones (PackedLinear) are copied. The embedding, row-major,
/// is the model's own.
class Pack {
 public:
  /// Throws: Error if the model has what the kernels do not take (sizes, dtype, device), naming it.
  Pack(Gemma3Model model, kernels::Format format);

  /// Empty, or why the fused engine cannot run this model.
  static std::string refusal(const Gemma3Model& model);

  const std::vector<LayerPack>& layers() const { return layers_; }
  const float* final_norm() const { return final_norm_; }
  const kernels::Bf16* embedding() const;  // (V, E)
  const kernels::Bf16* head() const;       // (V, E), the same where tied
  kernels::HeadScan scan() const { return scan_.view(); }
  int64_t layer_bytes() const { return layer_bytes_; }   // what one token reads of the layers
  const std::string& format() const { return format_; }  // "lossless12", or a recipe's name

  /// Whether the model's parameters are still those that were packed.
  bool is_current() const;

 private:
  struct Source;
  kernels::Packed add(const Source& source, kernels::Format format);
  const float* add_norm(const torch::Tensor& weight);
  void remember(const torch::Tensor& parameter);

  Gemma3Model model_;
  std::vector<LayerPack> layers_;
  const float* final_norm_ = nullptr;
  ScanTensors scan_;
  int64_t layer_bytes_ = 0;
  std::string format_;
  std::shared_ptr<std::byte> arena_;
  size_t arena_used_ = 0;
  std::vector<std::vector<uint8_t>> exponents_;
  std::vector<std::vector<kernels::Exception>> exceptions_;
  std::vector<std::vector<float>> norms_;
  struct Seen {
    torch::Tensor parameter;
    const void* data;
    int64_t version;
  };
  std::vector<Seen> seen_;
};

}  // namespace gemma_torch
