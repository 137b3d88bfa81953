#pragma once

#include <ATen/Functions.h>

#include <algorithm>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <vector>

#include "gemma_torch/engine/engine.h"
#include "gemma_torch/pretrained.h"
#include "support/golden.h"
#include "support/real_model.h"

// For the tests on the real weights.

namespace gemma_torch::test_real {

using namespace gemma_torch::test;
using nlohmann::json;

inline constexpr double kLogitTolerance =
    2e-3;  // float32 sums in another order, of logits that reach 36
inline constexpr Sampling kGreedy{.temperature = 0};

// The model in one dtype, loaded once for all tests of this program. Nothing where there are no weights.
inline const Pretrained* real(c10::ScalarType dtype) {
  static std::map<c10::ScalarType, Pretrained> loaded;
  const auto folder = real_model_dir();
  if (!folder) {
    std::cout << kNoRealModel << "\n";
    return nullptr;
  }
  if (!loaded.contains(dtype)) {
    loaded.emplace(dtype, load_pretrained(*folder, {.dtype = dtype}));
  }
  return &loaded.at(dtype);
}

inline at::Tensor as_row(const std::vector<int64_t>& ids) {
  return at::tensor(ids, at::kLong).view({1, -1});
}

inline void append_in_pieces(Engine& engine, const std::vector<int64_t>& ids, size_t piece) {
  for (size_t start = 0; start < ids.size(); start += piece) {
    engine.append(std::vector<int64_t>(
        ids.begin() + static_cast<int64_t>(start),
        ids.begin() + static_cast<int64_t>(std::min(ids.size(), start + piece))));
  }
}

inline std::vector<int64_t> greedy(Engine& engine, int64_t n) {
  std::vector<int64_t> ids;
  engine.decode(n, kGreedy, [&](int64_t, int64_t id) {
    ids.push_back(id);
    return true;
  });
  return ids;
}

// Logits (T, V) of a prompt against the golden's at its kept positions; returns the largest difference.
inline double compare_kept(const json& prompt, const json& fixed_ids, const at::Tensor& logits) {
  double worst = 0;
  const auto at_ids = [&](int64_t position, const json& ids, const json& want) {
    for (size_t i = 0; i < ids.size(); ++i) {
      const double got = logits[position][ids[i].get<int64_t>()].item<double>();
      worst = std::max(worst, std::abs(got - want[i].get<double>()));
    }
  };
  for (size_t i = 0; i < prompt["positions"].size(); ++i) {
    const auto position = prompt["positions"][i].get<int64_t>();
    at_ids(position, prompt["top_ids"][i], prompt["top_logits"][i]);
    at_ids(position, fixed_ids, prompt["fixed_logits"][i]);
  }
  return worst;
}

}  // namespace gemma_torch::test_real
