#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "gemma_torch/inspect/sae.h"
#include "gemma_torch/text/tokenizer.h"

namespace gemma_torch::apps {

/// What was encoded, for reports.
struct EncodeCase {
  std::string file = {};
  SaeSites sites = {};
  std::vector<int64_t> ids = {};
  std::vector<int64_t> features = {};  // asked for by number
  std::optional<Tokenizer> tokenizer = {};
};

struct Encoded {
  TopFeatures top = {};
  at::Tensor activations = {};  // (T, features asked for)
  SaeFit fit = {};
};

/// {sae, input, output, ids, pieces, l0, explained, top: [[{feature, activation}]] by token,
/// features: [{feature, activations}]}. Features that are not active are left out of `top`.
nlohmann::json encode_json(const Encoded& encoded, const EncodeCase& of);
std::string encode_text(const Encoded& encoded, const EncodeCase& of);
/// A page with the text in the colours of each feature asked for.
std::string encode_page(const Encoded& encoded, const EncodeCase& of);

/// Mean negative log-likelihoods of one text, nats a token.
struct LossCase {
  std::string file = {};
  SaeSites sites = {};
  int64_t tokens = 0;
  double plain = 0, reconstructed = 0;
  double zeroed = 0;  // with zeros in the output site's place

  /// 1: nothing lost; 0: no better than zeros.
  double recovered() const { return (zeroed - reconstructed) / (zeroed - plain); }
};

/// {sae, input, output, tokens, nll, nll_reconstructed, nll_zeroed, increase, recovered}.
nlohmann::json loss_json(const LossCase& of);
std::string loss_text(const LossCase& of);

}  // namespace gemma_torch::apps
