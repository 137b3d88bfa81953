#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <vector>

namespace gemma_torch {

/// How the next token is chosen. In the order and with the meaning of transformers' generate(): repetition penalty,
/// temperature, top-k, top-p, min-p, then a draw from what is left. Computed in float32, sums in float64.
struct Sampling {
  double temperature = 1.0;  // 0: the most likely token (greedy)
  int64_t top_k = 0;         // keep the k most likely; 0: all
  double top_p = 1.0;        // keep the fewest most likely that together reach p
  double min_p = 0.0;        // keep those at least p times as likely as the most likely
  double repetition_penalty =
      1.0;  // divides positive, multiplies negative logits of tokens in the sequence
  uint64_t seed = 0;

  bool operator==(const Sampling&) const = default;
};

/// Throws Error naming the field if one is out of range.
void check_sampling(const Sampling& sampling);

struct Candidate {
  int64_t id = 0;
  float logit = 0.0F;
};

/// The better of two is the one with the larger logit, of equals that with the lower id.
inline bool is_better(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

/// A set of token ids whose memory is kept for the next ones.
class TokenSet {
 public:
  TokenSet() = default;
  explicit TokenSet(const std::vector<int64_t>& ids) { assign(ids); }
  void assign(const std::vector<int64_t>& ids);
  bool contains(int64_t id) const {
    return static_cast<size_t>(id) < marks_.size() && marks_[static_cast<size_t>(id)];
  }
  int64_t size() const { return static_cast<int64_t>(ids_.size()); }

 private:
  std::vector<int64_t> ids_;  // each once
  std::vector<bool> marks_;   // (the largest id so far + 1)
};

/// Lowers the logits of `seen` tokens among the candidates by `penalty`, and restores the order, best first.
void apply_repetition_penalty(std::vector<Candidate>& candidates,
                              const TokenSet& seen,
                              double penalty);

/// What temperature, top-k, top-p and min-p leave of candidates that are sorted best first: their probabilities,
/// for the first so many of them. Equals of the k-th most likely stay, as in transformers.
void filter(const std::vector<Candidate>& candidates,
            const Sampling& sampling,
            std::vector<double>& probabilities);

/// The token at `place`, 0 to 1, of those that filter() leaves, laid side by side in their order, as wide as they are
/// likely. Keeps their probabilities in `probabilities`.
int64_t draw(const std::vector<Candidate>& candidates,
             const Sampling& sampling,
             double place,
             std::vector<double>& probabilities);

/// A stream of random numbers for each row of a batch: one number a row for each token, whatever is drawn with it.
class Draws {
 public:
  Draws(const Sampling& sampling, int64_t batch);

  /// The next number of each row, at least 0 and below 1, until the next call; zeros for greedy sampling, which needs none.
  const std::vector<double>& next();

 private:
  bool greedy_;
  std::vector<std::mt19937_64> rows_;  // B
  std::vector<double> numbers_;        // B
};

}  // namespace gemma_torch
