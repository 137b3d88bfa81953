#include "gemma_torch/generate/generate.h"

#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <chrono>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

int64_t longest(const std::vector<std::vector<int64_t>>& prompts) {
  size_t length = 0;
  for (const auto& prompt : prompts) {
    length = std::max(length, prompt.size());
  }
  return static_cast<int64_t>(length);
}

void check_request(const Engine& engine,
                   const std::vector<std::vector<int64_t>>& prompts,
                   const GenerateOptions& options) {
  check(static_cast<int64_t>(prompts.size()) == engine.batch(),
        "[generate] prompts: expected {}, got {}",
        engine.batch(),
        prompts.size());
  check(engine.batch() == 1 || engine.position() == 0,
        "[generate] several prompts need an empty engine, got one at position {}",
        engine.position());
  check(options.max_new_tokens >= 1,
        "[generate] max_new_tokens: expected at least 1, got {}",
        options.max_new_tokens);
  for (size_t row = 0; row < prompts.size(); ++row) {
    check(
        !prompts[row].empty(), "[generate] prompt {}: expected at least one token, got none", row);
  }
  // The last token chosen is never appended.
  const auto needed = engine.position() + longest(prompts) + options.max_new_tokens - 1;
  check(needed <= engine.capacity(),
        "[generate] prompt of {} tokens and {} new ones: expected to fit {} with {} already held. "
        "Hint: a larger capacity (--ctx) or fewer new tokens",
        longest(prompts),
        options.max_new_tokens,
        engine.capacity(),
        engine.position());
  check_sampling(options.sampling);
}

void append_prompts(Engine& engine, const std::vector<std::vector<int64_t>>& prompts) {
  const auto length = longest(prompts);
  auto ids = at::zeros({engine.batch(), length}, at::kLong);
  auto first = at::zeros({engine.batch()}, at::kLong);
  for (int64_t row = 0; row < engine.batch(); ++row) {
    const auto& prompt = prompts[static_cast<size_t>(row)];
    const auto padding = length - static_cast<int64_t>(prompt.size());
    first.mutable_data_ptr<int64_t>()[row] = padding;
    std::copy(
        prompt.begin(), prompt.end(), ids.mutable_data_ptr<int64_t>() + row * length + padding);
  }
  if (engine.batch() > 1) {
    engine.reset(first);
  }
  engine.append(ids);
}

}  // namespace

const char* finish_name(FinishReason reason) {
  return reason == FinishReason::kStop     ? "stop"
         : reason == FinishReason::kLength ? "length"
                                           : "callback";
}

GenerateResult generate(Engine& engine,
                        const std::vector<std::vector<int64_t>>& prompts,
                        const GenerateOptions& options,
                        const OnToken& on_token) {
  check_request(engine, prompts, options);
  GenerateResult result;
  result.rows.resize(prompts.size());
  for (const auto& prompt : prompts) {
    result.prompt_tokens += static_cast<int64_t>(prompt.size());
  }
  const auto start = Clock::now();
  append_prompts(engine, prompts);
  result.prefill_seconds = seconds_since(start);

  std::vector<bool> ended(prompts.size(), false);
  engine.decode(options.max_new_tokens, options.sampling, [&](int64_t row, int64_t id) {
    const auto index = static_cast<size_t>(row);
    if (ended[index]) {
      return false;
    }
    auto& out = result.rows[index];
    out.ids.push_back(id);
    if (result.first_token_seconds == 0) {
      result.first_token_seconds = seconds_since(start);
    }
    const auto& stops = options.stop_ids;
    const bool wanted = !on_token || on_token(row, id);
    const bool stop = std::find(stops.begin(), stops.end(), id) != stops.end();
    out.finish = stop      ? FinishReason::kStop
                 : !wanted ? FinishReason::kCallback
                           : FinishReason::kLength;
    ended[index] = stop || !wanted;
    return !ended[index];
  });
  result.decode_seconds = seconds_since(start) - result.first_token_seconds;
  for (const auto& row : result.rows) {
    result.decode_steps = std::max(result.decode_steps, static_cast<int64_t>(row.ids.size()) - 1);
  }
  return result;
}

GenerateResult Session::turn(const std::vector<int64_t>& ids,
                             const GenerateOptions& options,
                             const OnToken& on_token) {
  auto prompt = pending_;
  prompt.insert(prompt.end(), ids.begin(), ids.end());
  auto result = generate(engine_, {prompt}, options, on_token);
  pending_ = {result.rows[0].ids.back()};
  return result;
}

}  // namespace gemma_torch
