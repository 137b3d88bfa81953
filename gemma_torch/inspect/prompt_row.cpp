#include "gemma_torch/inspect/prompt_row.h"

#include <ATen/ops/tensor.h>

#include "gemma_torch/base/error.h"

namespace gemma_torch {

void check_ids(const char* where,
               const std::string& what,
               const std::vector<int64_t>& ids,
               int64_t vocab_size) {
  for (const auto id : ids) {
    check(id >= 0 && id < vocab_size,
          "[{}] {}: expected ids from 0 to {}, got {}",
          where,
          what,
          vocab_size - 1,
          id);
  }
}

at::Tensor prompt_row(const char* where, const std::vector<int64_t>& ids, Gemma3Model model) {
  check(!ids.empty(), "[{}] prompt: expected at least one token, got none", where);
  check_ids(where, "prompt", ids, model->cfg.vocab_size);
  return at::tensor(ids, at::kLong).unsqueeze(0).to(model->tok_emb->weight.device());
}

int64_t checked_position(const char* where, int64_t position, int64_t T) {
  check(position >= -T && position < T,
        "[{}] position: expected {} to {}, got {}",
        where,
        -T,
        T - 1,
        position);
  return position < 0 ? position + T : position;
}

void check_tokens(const char* where,
                  const std::vector<int64_t>& tokens,
                  std::pair<size_t, size_t> fewest_most,
                  int64_t vocab_size) {
  const auto [fewest, most] = fewest_most;
  check(tokens.size() >= fewest && tokens.size() <= most,
        "[{}] tokens: expected {} to {}, got {}",
        where,
        fewest,
        most,
        tokens.size());
  check_ids(where, "tokens", tokens, vocab_size);
}

}  // namespace gemma_torch
