#include "gemma_torch/inspect/lens.h"

#include <ATen/Functions.h>

#include "gemma_torch/inspect/attention_maps.h"
#include "gemma_torch/inspect/patch.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/golden.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

constexpr int64_t kT = 21;  // the window is 8
constexpr int64_t kV = 1003;

std::vector<int64_t> some_ids(int64_t n = kT) {
  return small_prompt(n);
}

at::Tensor as_row(const std::vector<int64_t>& ids) {
  return at::tensor(ids, at::kLong).unsqueeze(0);
}

/// Logits (T, V) float32 of a run that ends after `site`.
at::Tensor logits_after(Gemma3Model model, const SiteAt& site) {
  const torch::NoGradGuard no_grad;
  const auto x = site_values(model, as_row(some_ids()), {site}).at(site.name());
  return model->out_head(model->final_norm(x))[0].to(at::kFloat);
}

int64_t rank_of(const at::Tensor& logits, int64_t position, int64_t token) {
  const auto order = logits[position].argsort(/*dim=*/0, /*descending=*/true);
  return order.eq(token).nonzero().item<int64_t>() + 1;
}

}  // namespace

TEST_CASE("the last depth is the model's own prediction, bit for bit", "[lens]") {
  const torch::NoGradGuard no_grad;
  const auto models = small_models();
  const auto rounded = GENERATE(false, true);
  auto model = rounded ? models.rounded : models.wide;
  const auto lens = logit_lens(model, some_ids(), {.top = 7, .rows = kT});
  const auto logits = model->forward(as_row(some_ids()))[0].to(at::kFloat);
  const auto log_probs = logits.log_softmax(-1);
  const auto [values, ids] = logits.topk(7, -1);
  CHECK(lens.top_ids[4].equal(ids));
  CHECK(lens.top_logits[4].equal(values));
  CHECK(lens.top_log_probs[4].equal(log_probs.gather(-1, ids)));
  CHECK(lens.kl[4].abs().max().item<double>() == 0);
  const auto few = logit_lens(model, some_ids(), {.top = 7, .rows = 4});
  CHECK(max_difference(few.top_logits, lens.top_logits) < (rounded ? 0.1 : kFloatTolerance));
  CHECK(max_difference(few.kl, lens.kl) < (rounded ? 0.1 : kFloatTolerance));
}

TEST_CASE("an earlier depth is its residual stream through the final norm and the head", "[lens]") {
  const auto model = small_models().wide;
  const auto lens = logit_lens(model, some_ids(), {.top = 3, .rows = 5});
  REQUIRE(lens.top_ids.sizes() == at::IntArrayRef({5, kT, 3}));
  const auto last = logits_after(model, {Site::kResidPost, 3}).log_softmax(-1);
  for (const auto& [depth, site] : {std::pair<int64_t, SiteAt>{0, {Site::kEmbed}},
                                    {1, {Site::kResidPost, 0}},
                                    {3, {Site::kResidPost, 2}}}) {
    CAPTURE(site.name());
    const auto logits = logits_after(model, site);
    const auto log_probs = logits.log_softmax(-1);
    const auto [values, ids] = logits.topk(3, -1);
    CHECK(lens.top_ids[depth].equal(ids));
    CHECK(max_difference(lens.top_logits[depth], values) < kFloatTolerance);
    CHECK(max_difference(lens.top_log_probs[depth], log_probs.gather(-1, ids)) < kFloatTolerance);
    const auto kl = (last.to(at::kDouble).exp() * (last - log_probs).to(at::kDouble)).sum(-1);
    CHECK(kl.min().item<double>() > 0.01);
    CHECK(max_difference(lens.kl[depth], kl) < kFloatTolerance);
    for (const int64_t position : {0, 11, 19}) {
      const auto next = some_ids()[static_cast<size_t>(position + 1)];
      CHECK(lens.targets[position][0].item<int64_t>() == next);
      CHECK(lens.target_ranks[depth][position][0].item<int64_t>() ==
            rank_of(logits, position, next));
      CHECK(max_difference(lens.target_log_probs[depth][position][0], log_probs[position][next]) <
            kFloatTolerance);
    }
    CHECK(lens.targets[kT - 1][0].item<int64_t>() == -1);
    CHECK(lens.target_ranks[depth][kT - 1][0].item<int64_t>() == 0);
    CHECK(std::isnan(lens.target_log_probs[depth][kT - 1][0].item<float>()));
  }
}

TEST_CASE("given tokens are followed at every position", "[lens]") {
  const auto model = small_models().wide;
  const auto lens = logit_lens(model, some_ids(), {.targets = {17, 40}, .rows = 8});
  REQUIRE(lens.target_ranks.sizes() == at::IntArrayRef({5, kT, 2}));
  const auto logits = logits_after(model, {Site::kResidPost, 1});
  for (const int64_t position : {0, 9, 20}) {
    for (const int64_t m : {0, 1}) {
      const int64_t token = m == 0 ? 17 : 40;
      CHECK(lens.targets[position][m].item<int64_t>() == token);
      CHECK(lens.target_ranks[2][position][m].item<int64_t>() == rank_of(logits, position, token));
      const auto want = logits.log_softmax(-1)[position][token];
      CHECK(max_difference(lens.target_log_probs[2][position][m], want) < kFloatTolerance);
    }
  }
}

TEST_CASE("a lens tells how far it is, can be stopped, and refuses what it cannot read", "[lens]") {
  const auto model = small_models().wide;
  std::vector<int64_t> done;
  LensOptions options{.rows = 8};
  options.on_progress = [&](int64_t n, int64_t total) {
    CHECK(total == 5 * kT);
    done.push_back(n);
    return true;
  };
  logit_lens(model, some_ids(), options);
  CHECK(done.size() == 15);
  CHECK(done.front() == 8);
  CHECK(done.back() == 5 * kT);
  options.on_progress = [](int64_t n, int64_t) { return n < 16; };
  const auto error = [&](const std::vector<int64_t>& ids, const LensOptions& how) {
    return error_of([&] { logit_lens(model, ids, how); });
  };
  CHECK_THAT(error(some_ids(), options), Catch::Contains("[lens] stopped after 16 of 105 rows"));
  CHECK_THAT(error({}, {}), Catch::Contains("[lens] prompt: expected at least one token"));
  CHECK_THAT(error({5, kV}, {}), Catch::Contains("expected ids from 0 to 1002, got 1003"));
  CHECK_THAT(error({5, -1}, {}), Catch::Contains("got -1"));
  CHECK_THAT(error({5}, {.targets = {kV}}), Catch::Contains("[lens] tokens: expected ids from 0"));
  CHECK_THAT(error({5}, {.top = 0}), Catch::Contains("top: expected 1 to 1003, got 0"));
  CHECK_THAT(error({5}, {.top = kV + 1}), Catch::Contains("got 1004"));
  CHECK_THAT(error({5}, {.rows = 0}), Catch::Contains("rows: expected at least 1, got 0"));
}

TEST_CASE("attention maps are the patterns, and their means", "[attention]") {
  const auto model = small_models().wide;
  const auto maps =
      attention_maps(model, some_ids(), {.layers = {2, 0}, .heads = {3, 1, 3}, .from = -2});
  REQUIRE(maps.size() == 4);
  const std::pair<int64_t, int64_t> places[] = {{0, 1}, {0, 3}, {2, 1}, {2, 3}};
  for (size_t i = 0; i < 4; ++i) {
    const auto [layer, head] = places[i];
    CHECK(maps[i].layer == layer);
    CHECK(maps[i].head == head);
    const SiteAt site{Site::kPattern, layer};
    const auto pattern = site_values(model, as_row(some_ids()), {site}).at(site.name())[0][head];
    CHECK(maps[i].pixels.equal(pattern));
    CHECK(maps[i].weights.equal(pattern[kT - 2]));
    double first = 0, previous = 0, self = 0, entropy = 0;
    for (int64_t t = 1; t < kT; ++t) {
      const auto row = pattern[t].to(at::kDouble);
      first += row[0].item<double>() / (kT - 1);
      previous += row[t - 1].item<double>() / (kT - 1);
      self += row[t].item<double>() / (kT - 1);
      const auto seen = row.masked_select(row > 0);
      entropy -= (seen * seen.log()).sum().item<double>() / (kT - 1);
    }
    CHECK(maps[i].to_first == Approx(first));
    CHECK(maps[i].to_previous == Approx(previous));
    CHECK(maps[i].to_self == Approx(self));
    CHECK(maps[i].entropy == Approx(entropy));
  }
  const auto all = attention_maps(model, some_ids());
  CHECK(all.size() == 16);
  CHECK_FALSE(all[0].weights.defined());
}

TEST_CASE("of many tokens a pixel is the largest weight", "[attention]") {
  const auto model = small_models().wide;
  const AttentionOptions one{.layers = {1}, .heads = {0}, .max_pixels = 6};
  const auto small = attention_maps(model, some_ids(), one)[0].pixels;
  const auto whole = attention_maps(model, some_ids(), {{1}, {0}})[0].pixels;
  REQUIRE(small.sizes() == at::IntArrayRef({6, 6}));  // 4 tokens a pixel, the last has one
  for (int64_t y = 0; y < 6; ++y) {
    for (int64_t x = 0; x < 6; ++x) {
      const auto square = whole.narrow(0, 4 * y, y == 5 ? 1 : 4).narrow(1, 4 * x, x == 5 ? 1 : 4);
      CHECK(small[y][x].equal(square.max()));
    }
  }
  const auto error = [&](const std::vector<int64_t>& ids, const AttentionOptions& options) {
    return error_of([&] { attention_maps(model, ids, options); });
  };
  CHECK_THAT(error({5}, {}), Catch::Contains("at least 2 tokens, got 1"));
  CHECK_THAT(error({5, 6}, {.layers = {4}}), Catch::Contains("layers: expected 0 to 3, got 4"));
  CHECK_THAT(error({5, 6}, {.heads = {-1}}), Catch::Contains("heads: expected 0 to 3, got -1"));
  CHECK_THAT(error({5, 6}, {.max_pixels = 0}), Catch::Contains("max_pixels"));
  CHECK_THAT(error({5, 6}, {.from = 2}), Catch::Contains("position: expected -2 to 1, got 2"));
}
