#include "gemma_torch/inspect/score.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/min.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <numeric>

#include "gemma_torch/base/error.h"
#include "gemma_torch/inspect/prompt_row.h"

namespace gemma_torch {
namespace {

// Tokens appended at once: what bounds the logits that is_greedy may need.
constexpr int64_t kPart = 64;

// Above it, with room for rounding, a probability is more than a half: no other can be larger.
constexpr float kSurelyBest = -0.69F;

using Ids = std::vector<int64_t>;

int64_t length(const Ids& ids) {
  return static_cast<int64_t>(ids.size());
}

at::Tensor row(const Ids& ids, int64_t begin, int64_t end) {
  return at::tensor(at::IntArrayRef(ids.data() + begin, ids.data() + end), at::kLong).view({1, -1});
}

void check_part(const Ids& ids, const std::string& what, int64_t vocab_size) {
  check(!ids.empty(), "[score] {}: expected at least one token, got none", what);
  check_ids("score", what, ids, vocab_size);
}

void check_request(const Engine& engine, const Ids& context, const std::vector<Ids>& all) {
  check_part(context, "context", engine.vocab_size());
  int64_t longest = 1;
  for (size_t i = 0; i < all.size(); ++i) {
    check_part(all[i], fmt::format("continuation {}", i), engine.vocab_size());
    longest = std::max(longest, length(all[i]));
  }
  const auto needed = length(context) + longest - 1;  // the last token is predicted, never run
  check(engine.batch() == 1 && engine.capacity() >= needed,
        "[score] engine: expected batch 1 and a capacity of {}, got {} and {}",
        needed,
        engine.batch(),
        engine.capacity());
}

// What is known after the context alone: every continuation's first token.
class FirstToken {
 public:
  explicit FirstToken(Engine& engine)
      : logits_(engine.logits(Rows::kLast).to(at::kCPU).view(-1)),
        total_(logits_.logsumexp(/*dim=*/0).item<float>()),
        best_(logits_.argmax().item<int64_t>()) {}

  double log_prob(int64_t id) const { return logits_[id].item<float>() - total_; }
  bool is_best(int64_t id) const { return id == best_; }

 private:
  at::Tensor logits_;  // (V) float32
  float total_;        // as log_prob() of the engines: float32 throughout
  int64_t best_;
};

// Whether the targets (1, T) of the last append are the most probable tokens.
bool are_best(Engine& engine, const at::Tensor& log_probs, const at::Tensor& targets) {
  return log_probs.min().item<float>() > kSurelyBest ||
         engine.logits(Rows::kAll).argmax(/*dim=*/-1).to(at::kCPU).equal(targets);
}

// One continuation, in an engine that stands at the end of the context.
ContinuationScore score_one(Engine& engine, const FirstToken& first, const Ids& ids) {
  ContinuationScore score{{first.log_prob(ids[0])}, first.is_best(ids[0])};
  const auto last = length(ids) - 1;
  for (int64_t begin = 0; begin < last; begin += kPart) {
    const auto end = std::min(begin + kPart, last);
    engine.append(row(ids, begin, end));
    const auto targets = row(ids, begin + 1, end + 1);
    const auto found = engine.log_prob(targets);
    const auto* values = found.const_data_ptr<float>();
    score.log_probs.insert(score.log_probs.end(), values, values + (end - begin));
    score.is_greedy = score.is_greedy && are_best(engine, found, targets);
  }
  return score;
}

// Back to the end of the context.
void return_to(Engine& engine, const Ids& context) {
  if (engine.position() == length(context)) {
    return;
  }
  try {
    engine.rewind(length(context));
  } catch (const Error&) {  // the ring has lost what the next token would see
    engine.reset();
    engine.append(context);
  }
}

}  // namespace

double ContinuationScore::total() const {
  return std::accumulate(log_probs.begin(), log_probs.end(), 0.0);
}

std::vector<ContinuationScore> score_continuations(Engine& engine,
                                                   const Ids& context,
                                                   const std::vector<Ids>& continuations) {
  check_request(engine, context, continuations);
  engine.reset();
  engine.append(context);
  const FirstToken first(engine);
  std::vector<ContinuationScore> scores;
  for (const auto& ids : continuations) {
    return_to(engine, context);
    scores.push_back(score_one(engine, first, ids));
  }
  return scores;
}

}  // namespace gemma_torch
