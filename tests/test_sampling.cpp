#include "gemma_torch/engine/sampling.h"

#include <algorithm>
#include <map>

#include "gemma_torch/base/error.h"
#include "support/catch.h"
#include "support/golden.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

std::vector<Candidate> sorted(const std::vector<float>& logits) {
  std::vector<Candidate> all;
  for (size_t i = 0; i < logits.size(); ++i) {
    all.push_back({static_cast<int64_t>(i), logits[i]});
  }
  apply_repetition_penalty(all, TokenSet(), 1.0);  // sorts
  return all;
}

}  // namespace

TEST_CASE("filters leave what transformers' processors leave", "[sampling][golden]") {
  const auto cases = golden_json("sampling.json")["cases"];
  for (const auto& item : cases) {
    CAPTURE(item.dump());
    auto candidates = sorted(item["logits"]);
    Sampling sampling{.temperature = item.value("temperature", 1.0),
                      .top_k = item.value("top_k", int64_t{0}),
                      .top_p = item.value("top_p", 1.0),
                      .min_p = item.value("min_p", 0.0),
                      .repetition_penalty = item.value("repetition_penalty", 1.0)};
    const TokenSet seen(item["history"].get<std::vector<int64_t>>());
    apply_repetition_penalty(candidates, seen, sampling.repetition_penalty);
    std::vector<double> shares;
    filter(candidates, sampling, shares);
    const std::vector<int64_t> ids = item["ids"];
    const std::vector<double> probabilities = item["probabilities"];
    REQUIRE(shares.size() == ids.size());
    std::map<int64_t, double> ours;
    for (size_t i = 0; i < shares.size(); ++i) {
      ours[candidates[i].id] = shares[i];
    }
    for (size_t i = 0; i < ids.size(); ++i) {
      REQUIRE(ours.contains(ids[i]));
      CHECK(ours[ids[i]] == Approx(probabilities[i]).epsilon(1e-4).margin(1e-9));
    }
  }
  CHECK(cases.size() >= 12);
}

TEST_CASE("draws follow the filtered probabilities", "[sampling]") {
  const auto candidates = sorted({1.0F, 3.0F, 2.0F, -4.0F});
  const Sampling sampling{.temperature = 0.8, .top_k = 3};
  std::vector<double> shares;
  filter(candidates, sampling, shares);
  Draws draws({.seed = 7}, /*batch=*/1);
  std::map<int64_t, int> counts;
  const int times = 40'000;
  for (int i = 0; i < times; ++i) {
    ++counts[draw(candidates, sampling, draws.next()[0], shares)];
  }
  for (size_t i = 0; i < shares.size(); ++i) {
    CHECK(counts[candidates[i].id] / static_cast<double>(times) == Approx(shares[i]).margin(0.01));
  }
  CHECK(counts.size() == 3);
}

TEST_CASE("temperature 0 is the best candidate, the lower id of equals", "[sampling]") {
  std::vector<double> shares;
  CHECK(draw(sorted({1.0F, 5.0F, 5.0F}), {.temperature = 0}, /*place=*/0.9, shares) == 1);
}

TEST_CASE("sampling values out of range are named", "[sampling]") {
  CHECK_THROWS_WITH(check_sampling({.temperature = -1}),
                    Catch::Contains("temperature") && Catch::Contains("got -1"));
  CHECK_THROWS_WITH(check_sampling({.top_k = -3}), Catch::Contains("top_k"));
  CHECK_THROWS_WITH(check_sampling({.top_p = 0}), Catch::Contains("top_p"));
  CHECK_THROWS_WITH(check_sampling({.min_p = 2}), Catch::Contains("min_p"));
  CHECK_THROWS_WITH(check_sampling({.repetition_penalty = 0}),
                    Catch::Contains("repetition_penalty"));
}
