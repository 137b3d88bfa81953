#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "gemma_torch/model/gemma3.h"

namespace gemma_torch {

/// Throws: Error, "[where] what: ..", naming an id that is not of the vocabulary.
void check_ids(const char* where,
               const std::string& what,
               const std::vector<int64_t>& ids,
               int64_t vocab_size);

/// A prompt as the modules take it: (1, T) int64 on the model's device.
/// Throws: Error, in the name of `where`, for no ids or one outside the vocabulary.
at::Tensor prompt_row(const char* where, const std::vector<int64_t>& ids, Gemma3Model model);

/// A position of T tokens, negative ones counted from the end.
/// Throws: Error where there is none.
int64_t checked_position(const char* where, int64_t position, int64_t T);

/// Throws: Error unless there are so many, and all are ids of the vocabulary.
void check_tokens(const char* where,
                  const std::vector<int64_t>& tokens,
                  std::pair<size_t, size_t> fewest_most,
                  int64_t vocab_size);

}  // namespace gemma_torch
