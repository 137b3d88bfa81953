#include "gemma_torch/inspect/sweep.h"

#include <ATen/Functions.h>

#include <algorithm>

#include "gemma_torch/inspect/patch.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/golden.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

constexpr int64_t kT = 21;  // the window is 8

at::Tensor some_ids(int64_t T = kT) {
  return ((at::arange(T, at::kLong) * 37 + 5) % 1003).unsqueeze(0);
}

/// Two prompts that differ in one token.
struct Prompts {
  at::Tensor clean = some_ids(), corrupted = some_ids();
  Prompts() { corrupted[0][6] = 900; }
};

at::Tensor last_logits(Gemma3Model model, const at::Tensor& ids, const Probe& probe = {}) {
  const torch::NoGradGuard no_grad;
  return model->forward(ids, /*cache=*/nullptr, probe)[0][kT - 1];
}

double score(const at::Tensor& logits) {
  return (logits[17] - logits[40]).item<double>();
}

/// The score of the corrupted run with one value of the clean one.
double patched(const Gemma3Model& model,
               const Prompts& prompts,
               const SiteAt& site,
               const Part& part) {
  const auto clean = site_values(model, prompts.clean, {site}).at(site.name());
  const Edit edit{site, part, {.fill = Fill::kValue, .value = clean}};
  return score(last_logits(model, prompts.corrupted, edits_probe({edit}, model->cfg, kT)));
}

}  // namespace

TEST_CASE("a sweep's every number is that of the patched run alone", "[sweep]") {
  const auto model = small_models().wide;
  const Prompts prompts;
  const std::vector<Site> sites = {Site::kMlpOut, Site::kZ, Site::kV, Site::kPattern};
  const auto result = sweep(
      model, prompts.clean, prompts.corrupted, {.sites = sites, .tokens = {17, 40}, .batch = 7});
  CHECK(std::abs(result.clean - score(last_logits(model, prompts.clean))) < kFloatTolerance);
  CHECK(std::abs(result.corrupted - score(last_logits(model, prompts.corrupted))) <
        kFloatTolerance);
  REQUIRE(result.maps.size() == 4);
  const int64_t columns[] = {kT, 4, 2, 4};
  for (size_t m = 0; m < 4; ++m) {
    const auto& map = result.maps[m];
    CHECK(map.site == sites[m]);
    CHECK(map.by_head == (m > 0));
    REQUIRE(map.scores.sizes() == at::IntArrayRef({4, columns[m]}));
    for (const auto& [layer, column] :
         {std::pair<int64_t, int64_t>{0, 0}, {1, 1}, {3, columns[m] - 1}}) {
      const SiteAt site = {map.site, layer};
      const auto part = map.by_head ? Part{.head = column} : Part{.positions = {column}};
      const auto alone = patched(model, prompts, site, part);
      CAPTURE(site.name(), column);
      CHECK(std::abs(map.scores[layer][column].item<double>() - alone) < kFloatTolerance);
    }
  }
}

TEST_CASE("0 is the corrupted run and 1 the clean one", "[sweep]") {
  const auto model = small_models().wide;
  const Prompts prompts;
  const SweepOptions options{.sites = {Site::kResidPre, Site::kResidPost}, .tokens = {17, 40}};
  const auto result = sweep(model, prompts.clean, prompts.corrupted, options);
  const auto pre = result.normalised(result.maps[0]), post = result.normalised(result.maps[1]);
  auto want = at::zeros({kT}, at::kDouble);
  want[kT - 1] = 1;  // the last layer's last position decides alone
  CHECK(max_difference(post[3], want) < 1e-3);
  want.zero_();
  want[6] = 1;  // the one token that differs
  CHECK(max_difference(pre[0], want) < 1e-3);
  CHECK(max_difference(pre.narrow(0, 1, 3), post.narrow(0, 0, 3)) < 1e-3);
  const auto one = sweep(model, prompts.clean, prompts.corrupted, {options.sites, {17}});
  CHECK(std::abs(one.clean - last_logits(model, prompts.clean)[17].item<double>()) <
        kFloatTolerance);
}

TEST_CASE("a sweep tells how far it is and can be stopped", "[sweep]") {
  const auto model = small_models().wide;
  const Prompts prompts;
  SweepOptions options{.sites = {Site::kZ, Site::kK}, .tokens = {17}, .batch = 5};
  std::vector<int64_t> done;
  options.on_progress = [&](int64_t n, int64_t total) {
    CHECK(total == 4 * 4 + 4 * 2);
    done.push_back(n);
    return true;
  };
  sweep(model, prompts.clean, prompts.corrupted, options);
  CHECK(done == std::vector<int64_t>{5, 10, 15, 20, 24});
  options.on_progress = [](int64_t n, int64_t) { return n < 10; };
  CHECK_THAT(error_of([&] { sweep(model, prompts.clean, prompts.corrupted, options); }),
             Catch::Contains("[sweep] stopped after 10 of 24 patched runs, nothing was written"));
}

TEST_CASE("a sweep that was cut after any pass goes on to the same bits", "[sweep]") {
  const auto model = small_models().wide;
  const Prompts prompts;
  SweepOptions options{.sites = {Site::kZ, Site::kK}, .tokens = {17, 40}, .batch = 5};
  const auto whole = sweep(model, prompts.clean, prompts.corrupted, options);
  for (int64_t cut = 0; cut <= 5; ++cut) {
    CAPTURE(cut);
    int64_t passes = 0;
    std::vector<double> kept;
    options.found = {};
    options.on_scores = [&](const std::vector<double>& scores) {
      check(passes++ < cut, "cut");
      kept.insert(kept.end(), scores.begin(), scores.end());
    };
    const auto stopped = error_of([&] { sweep(model, prompts.clean, prompts.corrupted, options); });
    CHECK(stopped == (cut < 5 ? "cut" : ""));
    CHECK(kept.size() == static_cast<size_t>(std::min<int64_t>(cut * 5, 24)));
    passes = 0;
    options.found = kept;
    options.on_scores = [&](const std::vector<double>&) { ++passes; };
    const auto result = sweep(model, prompts.clean, prompts.corrupted, options);
    CHECK(passes == 5 - cut);
    CHECK(result.clean == whole.clean);
    CHECK(result.corrupted == whole.corrupted);
    for (size_t m = 0; m < 2; ++m) {
      CHECK(result.maps[m].scores.equal(whole.maps[m].scores));
    }
  }
  for (const size_t found : {4, 6, 23, 25}) {
    options.found.assign(found, 0.0);
    CHECK_THAT(error_of([&] { sweep(model, prompts.clean, prompts.corrupted, options); }),
               Catch::Contains(fmt::format(
                   "[sweep] found: expected scores of passes of 5, in all 24, got {}", found)));
  }
}

TEST_CASE("what cannot be swept is refused", "[sweep]") {
  const auto model = small_models().wide;
  const Prompts prompts;
  const auto error = [&](const at::Tensor& corrupted, const SweepOptions& options) {
    return error_of([&] { sweep(model, prompts.clean, corrupted, options); });
  };
  const SweepOptions fine{.sites = {Site::kZ}, .tokens = {17}};
  CHECK_THAT(error(some_ids(20), fine),
             Catch::Contains("corrupted: expected 21 tokens as the clean prompt has, got 20"));
  CHECK_THAT(error(prompts.clean, fine), Catch::Contains("scores otherwise than the clean one"));
  CHECK_THAT(error(prompts.corrupted[0], fine), Catch::Contains("expected (1, T), got (21)"));
  CHECK_THAT(error(prompts.corrupted + 1000, fine), Catch::Contains("expected ids from 0 to 1002"));
  CHECK_THAT(error(prompts.corrupted, {{Site::kZ}, {1003}}), Catch::Contains("got 1003"));
  CHECK_THAT(error(prompts.corrupted, {{Site::kZ}, {}}), Catch::Contains("one or two, got 0"));
  CHECK_THAT(error(prompts.corrupted, {{}, {17}}), Catch::Contains("at least one, got none"));
  CHECK_THAT(error(prompts.corrupted, {{Site::kLogits}, {17}}),
             Catch::Contains("sites: expected those of layers, got logits"));
  CHECK_THAT(error(prompts.corrupted, {{Site::kZ}, {17}, 0}), Catch::Contains("batch: expected"));
}
