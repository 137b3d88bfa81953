#pragma once

#include <vector>

#include "gemma_torch/engine/engine.h"

namespace gemma_torch::test {

// Tokens by row.
struct Told {
  std::vector<std::vector<int64_t>> rows;
};

// What decode tells of until row r has `most[r]` tokens.
inline Told decoded(Engine& engine,
                    int64_t n,
                    const Sampling& sampling,
                    std::vector<size_t> most = {}) {
  Told told{std::vector<std::vector<int64_t>>(static_cast<size_t>(engine.batch()))};
  engine.decode(n, sampling, [&](int64_t row, int64_t id) {
    auto& ids = told.rows[static_cast<size_t>(row)];
    ids.push_back(id);
    return most.empty() || ids.size() < most[static_cast<size_t>(row)];
  });
  return told;
}

inline const Sampling kSamplings[] = {
    {.temperature = 0},
    {.temperature = 0, .repetition_penalty = 1.3},
    {.temperature = 1, .seed = 1},
    {.temperature = 0.7, .top_k = 5, .seed = 2},
    {.temperature = 1.5, .top_k = 64, .top_p = 0.9, .seed = 3},
    {.temperature = 1.2, .top_p = 0.8, .min_p = 0.02, .seed = 4},
    {.temperature = 2, .top_k = 20, .min_p = 0.3, .repetition_penalty = 1.5, .seed = 5},
    {.temperature = 1, .top_k = 40, .repetition_penalty = 0.7, .seed = 6},
};

}  // namespace gemma_torch::test
