#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/inspect/site_table.h"

namespace gemma_torch {

/// A JumpReLU sparse autoencoder, or a transcoder, whose output is another site's value. N inputs,
/// K features, M outputs (of an autoencoder N = M); everything float32 on the CPU.
/// features = relu(p) where p = x W_enc + b_enc is above the threshold, else 0.
/// output   = features W_dec + b_dec (+ x W_skip).
/// Source:  the layout of Gemma Scope's files.
struct Sae {
  at::Tensor W_enc = {};      // (N, K)
  at::Tensor W_dec = {};      // (K, M)
  at::Tensor b_enc = {};      // (K)
  at::Tensor b_dec = {};      // (M)
  at::Tensor threshold = {};  // (K)
  at::Tensor W_skip = {};     // (N, M); undefined where there is none

  int64_t inputs() const { return W_enc.size(0); }
  int64_t features() const { return W_enc.size(1); }
  int64_t outputs() const { return W_dec.size(1); }

  /// Activations (.., K) of x (.., N), in float32. Memory: (rows, K).
  at::Tensor encode(const at::Tensor& x) const;
  /// Those of some features alone, (.., size of `features`): no (.., K) is formed.
  at::Tensor encode(const at::Tensor& x, const std::vector<int64_t>& features) const;
  /// Output (.., M) for x (.., N), in float32. Memory: (rows, K) for a few rows at a time.
  at::Tensor reconstruct(const at::Tensor& x) const;
};

/// An autoencoder of these tensors: W_enc, W_dec, b_enc, b_dec, threshold and, where there is one,
/// W_skip; or Gemma Scope 2's spelling: w_enc, w_dec and affine_skip_connection. Any float dtype.
/// Throws: Error naming `file` and the tensor that is missing, strange or of the wrong shape.
Sae make_sae(const TensorMap& tensors, const std::string& file);

/// The same from a safetensors or .npz file; its first bytes say which. Throws: also as
/// load_safetensors and load_npz.
Sae load_sae(const std::string& path);

/// Where an autoencoder reads and what it stands for.
struct SaeSites {
  SiteAt input = {};
  SiteAt output = {};  // the same as `input` but for a transcoder
};

/// Throws: Error unless both sites are of the model, one for each token ("B T ..", such as z but
/// not pattern), as wide as the autoencoder's two ends, and the output is not before the input.
void check_sae_sites(const Sae& sae, const SaeSites& sites, const Gemma3Config& cfg);

/// A site's value as one row a token, (B, T, width): heads side by side.
at::Tensor token_rows(const at::Tensor& value);

/// What is done to the output site's value.
struct SaeEdit {
  /// The autoencoder's output takes the value's place; else the value is kept, and with it what the
  /// autoencoder does not explain.
  bool reconstruct = false;
  /// feature -> the activation it is given, 0: ablated; all others are as encoded.
  std::map<int64_t, double> activations = {};
};

/// A probe that makes the edit: (value - activation) W_dec[feature] is added for each feature. The
/// input site's value is kept from when the pass meets it until the output site; copies of the
/// probe share it, so one pass at a time. Without `reconstruct` only the features that are given a
/// value are encoded.
/// Throws: Error for a feature that there is not, or a value that is no number; as check_sae_sites.
Probe sae_probe(const Sae& sae,
                const SaeSites& sites,
                const SaeEdit& edit,
                const Gemma3Config& cfg);

/// The k features of the largest activations for each row of x (T, N), largest first; of equals
/// any. k is cut to the features that there are. Memory: (rows, K) for a few rows at a time.
struct TopFeatures {
  at::Tensor features = {};     // (T, k) int64
  at::Tensor activations = {};  // (T, k) float32
};
TopFeatures top_features(const Sae& sae, const at::Tensor& x, int64_t k);

/// How well an autoencoder stands for rows x (T, N) of its input and y (T, M) of its output site.
struct SaeFit {
  double l0 = 0;         // mean count of active features a token
  double explained = 0;  // 1 - |y - output|^2 / |y - mean y|^2; the mean over the rows
};
SaeFit fit_of(const Sae& sae, const at::Tensor& x, const at::Tensor& y);

}  // namespace gemma_torch
