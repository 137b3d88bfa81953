#include "gemma_torch/inspect/perplexity.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/tensor.h>

#include <algorithm>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

// Tokens run between two reports of progress.
constexpr int64_t kStep = 512;

at::Tensor row(const std::vector<int64_t>& ids) {
  return at::tensor(ids, at::kLong).view({1, -1});
}

std::vector<int64_t> slice(const std::vector<int64_t>& ids, int64_t begin, int64_t end) {
  return {ids.begin() + begin, ids.begin() + end};
}

class Scorer {
 public:
  Scorer(Engine& engine, const std::vector<int64_t>& ids) : engine_(engine), ids_(ids) {}

  // Appends tokens begin .. end - 1 and scores the one after each of them.
  void score(const std::vector<int64_t>& context, int64_t begin) {
    engine_.append(context);
    const auto end = begin + static_cast<int64_t>(context.size());
    const auto found = engine_.log_prob(row(slice(ids_, begin + 1, end + 1)));
    for (int64_t i = begin + 1; i <= end; ++i) {
      const auto log_prob = found.const_data_ptr<float>()[i - begin - 1];
      scores.push_back({i, ids_[static_cast<size_t>(i)], log_prob});
    }
  }

  std::vector<TokenScore> scores;

 private:
  Engine& engine_;
  const std::vector<int64_t>& ids_;
};

void report(const PerplexityOptions& options, int64_t done, int64_t total) {
  if (options.on_progress) {
    options.on_progress(done, total);
  }
}

void score_windows(Engine& engine,
                   const std::vector<int64_t>& ids,
                   const PerplexityOptions& options,
                   Scorer& scorer) {
  const auto c = options.chunk;
  const auto total = static_cast<int64_t>(ids.size()) / c * c;
  for (int64_t start = 0; start + c <= total; start += c) {
    engine.reset();
    auto unscored = slice(ids, start, start + c / 2);
    unscored[0] = options.bos_id;
    engine.append(unscored);
    scorer.score(slice(ids, start + c / 2, start + c - 1), start + c / 2);
    report(options, start + c, total);
  }
}

void score_sequence(Engine& engine,
                    const std::vector<int64_t>& ids,
                    const PerplexityOptions& options,
                    Scorer& scorer) {
  engine.reset();
  const auto last = static_cast<int64_t>(ids.size()) - 1;  // predicted, never run
  for (int64_t begin = 0; begin < last; begin += kStep) {
    const auto end = std::min(begin + kStep, last);
    scorer.score(slice(ids, begin, end), begin);
    report(options, end, last);
  }
}

}  // namespace

std::vector<TokenScore> score_tokens(Engine& engine,
                                     const std::vector<int64_t>& ids,
                                     const PerplexityOptions& options) {
  const auto length = static_cast<int64_t>(ids.size());
  check(options.chunk == 0 || options.chunk >= 4,
        "[perplexity] chunk: expected 0 or at least 4 tokens, got {}",
        options.chunk);
  check(
      options.chunk == 0 || length >= options.chunk,
      "[perplexity] text: expected at least one chunk of {} tokens, got {}. Hint: a smaller -c, or "
      "-c 0 for the whole text as one sequence",
      options.chunk,
      length);
  check(length >= 2, "[perplexity] text: expected at least 2 tokens, got {}", length);
  const auto window = options.chunk > 0 ? options.chunk : length;
  check(engine.batch() == 1 && engine.capacity() >= window - 1,
        "[perplexity] engine: expected batch 1 and a capacity of {}, got {} and {}",
        window - 1,
        engine.batch(),
        engine.capacity());
  Scorer scorer(engine, ids);
  if (options.chunk > 0) {
    score_windows(engine, ids, options, scorer);
  } else {
    score_sequence(engine, ids, options, scorer);
  }
  return std::move(scorer.scores);
}

double mean_nll(const std::vector<TokenScore>& scores) {
  check(!scores.empty(), "[perplexity] scores: expected at least one, got none");
  double sum = 0;
  for (const auto& score : scores) {
    sum -= score.log_prob;
  }
  return sum / static_cast<double>(scores.size());
}

}  // namespace gemma_torch
