#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace gemma_torch {

/// The places in the model where a value can be read or replaced, in the order a token passes them.
/// Axes: B batch, T new tokens, S stored tokens, E emb_dim, H heads, G kv groups, D head_dim, F hidden_dim, V vocab.
enum class Site {
  kEmbed,      // (B, T, E) scaled embedding
  kResidPre,   // (B, T, E) what enters a block
  kAttnIn,     // (B, T, E) after input_layernorm
  kQ,          // (B, H, T, D) after q_norm, before RoPE
  kK,          // (B, G, T, D) after k_norm, before RoPE
  kV,          // (B, G, T, D)
  kRotQ,       // (B, H, T, D) after RoPE, not yet scaled
  kRotK,       // (B, G, T, D) after RoPE
  kScores,     // (B, H, T, S) scaled, before hidden tokens are masked
  kPattern,    // (B, H, T, S) after softmax
  kZ,          // (B, T, H, D) per head, before out_proj
  kAttnProj,   // (B, T, E) after out_proj
  kAttnOut,    // (B, T, E) after post_attention_layernorm: what is added
  kResidMid,   // (B, T, E)
  kMlpIn,      // (B, T, E) after pre_feedforward_layernorm
  kGate,       // (B, T, F) fc1, before gelu
  kUp,         // (B, T, F) fc2
  kMlpAct,     // (B, T, F) gelu(gate) * up
  kMlpProj,    // (B, T, E) after fc3
  kMlpOut,     // (B, T, E) after post_feedforward_layernorm: what is added
  kResidPost,  // (B, T, E) what leaves a block
  kFinalNorm,  // (B, T, E)
  kLogits,     // (B, T, V)
};

/// Where a probe is called. `positions` (T) int64 are the places of the tokens in the sequence.
struct At {
  Site site;
  int64_t layer;  // -1 for embed, final_norm and logits
  const at::Tensor& positions;
};

/// Called with the value at a site; what it returns takes the value's place (return it unchanged to only look).
/// Empty by default, and then costs nothing. Gradients flow through it.
using Probe = std::function<at::Tensor(const At&, const at::Tensor&)>;

inline at::Tensor tap(const Probe& probe, const At& at, at::Tensor x) {
  return probe ? probe(at, x) : x;
}

inline constexpr std::array<std::string_view, 23> kSiteNames = {
    "embed",  "resid_pre", "attn_in",  "q",         "k",          "v",          "rot_q",  "rot_k",
    "scores", "pattern",   "z",        "attn_proj", "attn_out",   "resid_mid",  "mlp_in", "gate",
    "up",     "mlp_act",   "mlp_proj", "mlp_out",   "resid_post", "final_norm", "logits"};

/// "embed", "blocks.5.pattern", "final_norm": the name of a site in files and reports.
inline std::string site_name(Site site, int64_t layer) {
  const std::string name(kSiteNames[static_cast<size_t>(site)]);
  return layer < 0 ? name : "blocks." + std::to_string(layer) + "." + name;
}

}  // namespace gemma_torch
