#pragma once

#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/embedding.h>

#include <functional>
#include <tuple>

#include "gemma_torch/model/config.h"
#include "gemma_torch/model/kv_cache.h"
#include "gemma_torch/model/linear.h"
#include "gemma_torch/model/probe.h"

// Gemma 3, cell by cell as in the notebook standalone-gemma3.ipynb (LLMs-from-scratch, ch05/12_gemma3), whose cell
// numbers and names stand here too.
// Axes: B batch, T new tokens, S stored tokens (T without a cache), E emb_dim, H heads, G kv groups, D head_dim,
// F hidden_dim, V vocab.

namespace gemma_torch {

/// What the tokens of one call share, for one layer type.
struct AttentionInput {
  torch::Tensor cos, sin;  // (T, D) float32, of angles in radians
  torch::Tensor hidden;    // (B or 1, 1, T, S) bool, true = not attended
  Stored stored;
};

/// What the blocks of one forward pass share.
struct BlockInput {
  torch::Tensor positions;       // (T) int64
  AttentionInput global, local;  // full and sliding layers
  KvCache* cache = nullptr;
  const Probe& probe;
};

/// Gated feed-forward net: fc3(gelu(fc1 x) * fc2 x).   Source: cell 8.
class FeedForwardImpl : public torch::nn::Module {
 public:
  FeedForwardImpl(const Gemma3Config& cfg,
                  const torch::TensorOptions& options,
                  Init init = Init::kReference);

  /// (B, T, E) -> (B, T, E)
  torch::Tensor forward(const torch::Tensor& x, const BlockInput& in, int64_t layer);

  Linear fc1{nullptr}, fc2{nullptr}, fc3{nullptr};  // gate, up, down
};
TORCH_MODULE(FeedForward);

/// x / rms(x) * (1 + scale) over the last axis, computed in float32.   Source: cell 9.
class RMSNormImpl : public torch::nn::Module {
 public:
  RMSNormImpl(int64_t emb_dim, double eps, const torch::TensorOptions& options);

  torch::Tensor forward(const torch::Tensor& x);  // (..., N) -> (..., N), dtype of x
  void pretty_print(std::ostream& stream) const override { stream << "RMSNorm()"; }

  torch::Tensor scale;  // (N), zero-centred
  double eps;
};
TORCH_MODULE(RMSNorm);

/// cos and sin of the rotation angles, (T, D) float32 each, for tokens at `positions` (T).
/// The notebook keeps a table for every position of the context (128 MiB); the same numbers are computed here from
/// the positions of one call. `scaling` divides the frequencies (linear RoPE scaling).
/// Units:  radians.   Throws: Error if head_dim is odd.   Source: cell 10.
std::pair<torch::Tensor, torch::Tensor> compute_rope_params(const torch::Tensor& positions,
                                                            int64_t head_dim,
                                                            double theta_base = 10'000,
                                                            double scaling = 1.0);

/// Rotates feature pairs (i, i + D/2) of every head by the angle of its position, in float32.
/// Shapes:  x (B, H, T, D), cos and sin (T, D) -> (B, H, T, D) in the dtype of x.
/// Throws:  Error if D is odd or cos does not have T rows.   Source: cell 10.
torch::Tensor apply_rope(const torch::Tensor& x,
                         const torch::Tensor& cos,
                         const torch::Tensor& sin);

/// Attention of H query heads over G groups of keys and values.   Source: cell 11.
class GroupedQueryAttentionImpl : public torch::nn::Module {
 public:
  GroupedQueryAttentionImpl(const Gemma3Config& cfg,
                            const torch::TensorOptions& options,
                            Init init = Init::kReference);

  /// (B, T, E) -> (B, T, E)
  torch::Tensor forward(const torch::Tensor& x, const BlockInput& in, int64_t layer);

  int64_t num_heads, num_kv_groups, head_dim;
  double scaling;
  bool sliding = false;
  Linear W_query{nullptr}, W_key{nullptr}, W_value{nullptr}, out_proj{nullptr};
  RMSNorm q_norm{nullptr}, k_norm{nullptr};  // empty without qk_norm
};
TORCH_MODULE(GroupedQueryAttention);

/// One layer.   Source: cell 12.
class TransformerBlockImpl : public torch::nn::Module {
 public:
  TransformerBlockImpl(const Gemma3Config& cfg,
                       LayerType attn_type,
                       const torch::TensorOptions& options,
                       Init init = Init::kReference);

  torch::Tensor forward(torch::Tensor x,
                        const BlockInput& in,
                        int64_t layer);  // (B, T, E) -> (B, T, E)

  LayerType attn_type;
  GroupedQueryAttention att{nullptr};
  FeedForward ff{nullptr};
  RMSNorm input_layernorm{nullptr}, post_attention_layernorm{nullptr};
  RMSNorm pre_feedforward_layernorm{nullptr}, post_feedforward_layernorm{nullptr};
};
TORCH_MODULE(TransformerBlock);

/// hidden (B or 1, 1, T, S), true where the token at positions[t] does not see the stored one.   Source: cell 13.
/// `first` is the left padding of each row, (B, 1), or where each token's own sequence begins, (B, T) (undefined:
/// none); `window` 0 means no limit.
/// Every token sees itself, a padded one too, so no row is empty.
torch::Tensor create_mask(const torch::Tensor& positions,
                          const torch::Tensor& stored,
                          const torch::Tensor& first,
                          int64_t window);

/// Gemma 3: embedding, blocks, norm, output head.   Source: cell 13.
///
/// Differentiable, on any device and dtype (weights of float16 overflow in use). Registered in the reference's
/// order with its initialisers: after torch::manual_seed(s) it draws what the notebook draws. The head is a
/// parameter of its own until tie_weights().
class Gemma3ModelImpl : public torch::nn::Module {
 public:
  explicit Gemma3ModelImpl(const Gemma3Config& cfg,
                           const torch::Device& device = torch::kCPU,
                           Init init = Init::kReference);

  /// Token ids (B, T) int64 -> logits (B, T, V) in the dtype of the weights.
  torch::Tensor forward(const torch::Tensor& input_ids,
                        KvCache* cache = nullptr,
                        const Probe& probe = {});

  /// The same without the head: (B, T, E) after final_norm. With a cache, the tokens follow those it holds.
  /// Throws: Error for ids of another rank, or for a cache while gradients are recorded.
  torch::Tensor hidden(const torch::Tensor& input_ids,
                       KvCache* cache = nullptr,
                       const Probe& probe = {});

  /// The same for tokens that have their places already; the cache's position stays what it is.
  torch::Tensor hidden(const torch::Tensor& input_ids,
                       const Placement& at,
                       KvCache* cache,
                       const Probe& probe = {});

  /// What embeddings are multiplied by: sqrt(E), rounded as the config says.
  double emb_scale() const;

  /// What the blocks share of a pass over tokens at such places.
  BlockInput block_input(const Placement& at, KvCache* cache, const Probe& probe) const;

  /// Makes the output head the embedding itself: one parameter, one gradient.
  void tie_weights();

  /// Calls `visit(owner, name, linear)` for every Linear, in registration order.
  void for_each_linear(
      const std::function<void(torch::nn::Module&, const std::string&, Linear&)>& visit);

  torch::nn::Embedding tok_emb{nullptr};
  torch::nn::ModuleList blocks{nullptr};
  RMSNorm final_norm{nullptr};
  Linear out_head{nullptr};
  Gemma3Config cfg;

 private:
  torch::Tensor embed(const torch::Tensor& input_ids);
};
TORCH_MODULE(Gemma3Model);

}  // namespace gemma_torch
