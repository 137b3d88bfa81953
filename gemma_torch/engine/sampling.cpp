#include "gemma_torch/engine/sampling.h"

#include <algorithm>
#include <cmath>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

// Shares of the first `count` candidates, most likely first.
void softmax(const std::vector<Candidate>& candidates,
             size_t count,
             double temperature,
             std::vector<double>& shares) {
  shares.resize(count);
  double sum = 0;
  for (size_t i = 0; i < count; ++i) {
    shares[i] =
        std::exp((static_cast<double>(candidates[i].logit) - candidates[0].logit) / temperature);
    sum += shares[i];
  }
  for (auto& share : shares) {
    share /= sum;
  }
}

void renormalize(std::vector<double>& shares, size_t count) {
  shares.resize(count);
  double sum = 0;
  for (const double share : shares) {
    sum += share;
  }
  for (auto& share : shares) {
    share /= sum;
  }
}

}  // namespace

void check_sampling(const Sampling& s) {
  check(std::isfinite(s.temperature) && s.temperature >= 0,
        "[sampling] temperature: expected a number of at least 0, got {}",
        s.temperature);
  check(s.top_k >= 0, "[sampling] top_k: expected at least 0, got {}", s.top_k);
  check(s.top_p > 0 && s.top_p <= 1, "[sampling] top_p: expected above 0, to 1, got {}", s.top_p);
  check(s.min_p >= 0 && s.min_p <= 1, "[sampling] min_p: expected 0 to 1, got {}", s.min_p);
  check(std::isfinite(s.repetition_penalty) && s.repetition_penalty > 0,
        "[sampling] repetition_penalty: expected a number above 0, got {}",
        s.repetition_penalty);
}

void TokenSet::assign(const std::vector<int64_t>& ids) {
  for (const auto id : ids_) {
    marks_[static_cast<size_t>(id)] = false;
  }
  ids_.clear();
  for (const auto id : ids) {
    const auto at = static_cast<size_t>(id);
    if (at >= marks_.size()) {
      marks_.resize(at + 1);
    }
    if (!marks_[at]) {
      marks_[at] = true;
      ids_.push_back(id);
    }
  }
}

void apply_repetition_penalty(std::vector<Candidate>& candidates,
                              const TokenSet& seen,
                              double penalty) {
  const auto factor = static_cast<float>(penalty);
  for (auto& candidate : candidates) {
    if (seen.contains(candidate.id)) {
      candidate.logit = candidate.logit < 0 ? candidate.logit * factor : candidate.logit / factor;
    }
  }
  std::sort(candidates.begin(), candidates.end(), is_better);
}

void filter(const std::vector<Candidate>& candidates,
            const Sampling& s,
            std::vector<double>& shares) {
  check(!candidates.empty(), "[sampling] expected at least one candidate, got none");
  if (s.temperature == 0) {
    shares.assign(1, 1.0);
    return;
  }
  size_t k =
      s.top_k > 0 ? std::min(static_cast<size_t>(s.top_k), candidates.size()) : candidates.size();
  while (k < candidates.size() && candidates[k].logit == candidates[k - 1].logit) {
    ++k;  // equals of the k-th stay
  }
  softmax(candidates, k, s.temperature, shares);
  if (s.top_p < 1) {
    size_t count = 0;
    for (double before = 0; count < shares.size() && (count == 0 || before < s.top_p); ++count) {
      before += shares[count];
    }
    renormalize(shares, count);
  }
  if (s.min_p > 0) {
    const double least = s.min_p * shares[0];
    const auto end =
        std::find_if(shares.begin(), shares.end(), [&](double p) { return p < least; });
    renormalize(shares, static_cast<size_t>(end - shares.begin()));
  }
}

int64_t draw(const std::vector<Candidate>& candidates,
             const Sampling& s,
             double place,
             std::vector<double>& shares) {
  filter(candidates, s, shares);
  double sum = 0;
  for (size_t i = 0; i < shares.size(); ++i) {
    sum += shares[i];
    if (place < sum) {
      return candidates[i].id;
    }
  }
  return candidates[shares.size() - 1].id;
}

Draws::Draws(const Sampling& sampling, int64_t batch)
    : greedy_(sampling.temperature == 0), numbers_(static_cast<size_t>(batch), 0.0) {
  for (int64_t row = 0; row < batch; ++row) {
    rows_.emplace_back(sampling.seed + static_cast<uint64_t>(row));
  }
}

const std::vector<double>& Draws::next() {
  for (size_t row = 0; row < rows_.size() && !greedy_; ++row) {
    // 53 random bits, made here: the standard leaves the library's distributions open, and a seed must mean the same
    // text everywhere.
    numbers_[row] = static_cast<double>(rows_[row]() >> 11) * 0x1.0p-53;
  }
  return numbers_;
}

}  // namespace gemma_torch
