#include "gemma_torch/inspect/saliency.h"

#include <ATen/Functions.h>

#include "gemma_torch/inspect/integrated_gradients.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/golden.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

constexpr int64_t kT = 21, kE = 128;

std::vector<int64_t> some_ids() {
  return small_prompt(kT);
}

/// The target of a run on embeddings (1, T, E), straight through the model.
at::Tensor plain_value(Gemma3Model model,
                       const at::Tensor& embeddings,
                       const SaliencyTarget& target) {
  const Probe probe = [&](const At& at, const at::Tensor& x) {
    return at.site == Site::kEmbed ? embeddings : x;
  };
  const auto ids = at::tensor(some_ids(), at::kLong);
  const auto logits = model->forward(ids.unsqueeze(0), /*cache=*/nullptr, probe)[0];  // (T, V)
  if (target.of == Explained::kLoss) {
    return at::nll_loss(logits.narrow(0, 0, kT - 1).log_softmax(-1), ids.narrow(0, 1, kT - 1));
  }
  const auto row = logits[target.position < 0 ? target.position + kT : target.position];
  const auto x = target.of == Explained::kLogit ? row : row.log_softmax(-1);
  return target.tokens.size() == 1 ? x[target.tokens[0]]
                                   : x[target.tokens[0]] - x[target.tokens[1]];
}

double plain_number(const Gemma3Model& model, const at::Tensor& x, const SaliencyTarget& target) {
  const torch::NoGradGuard no_grad;
  return plain_value(model, x.unsqueeze(0), target).item<double>();
}

SaliencyTarget any_target() {
  return GENERATE(SaliencyTarget{Explained::kLogit, {17}},
                  SaliencyTarget{Explained::kLogit, {17, 40}, 9},
                  SaliencyTarget{Explained::kLogProb, {17}, -2},
                  SaliencyTarget{Explained::kLogProb, {17, 40}, 20},
                  SaliencyTarget{Explained::kLoss});
}

}  // namespace

TEST_CASE("value and gradient are those of autograd through the whole model", "[saliency]") {
  const auto model = small_models().wide;
  const auto target = any_target();
  const auto found = gradient_times_input(model, some_ids(), target);
  CHECK(!model->tok_emb->weight.grad().defined());  // weights are left alone
  const auto leaf = found.embed.unsqueeze(0).clone().requires_grad_();
  const auto value = plain_value(model, leaf, target);
  value.backward();
  const auto want = leaf.grad()[0];
  CHECK(found.value == Approx(value.item<double>()).margin(1e-5));
  CHECK(want.abs().max().item<double>() > 1e-3);
  CHECK(max_difference(found.gradient, want) < 1e-5 * want.abs().max().item<double>());
  CHECK(max_difference(found.scores, (want * found.embed).to(at::kDouble).sum(1)) < 1e-5);
  CHECK(max_difference(found.norms, want.to(at::kDouble).square().sum(1).sqrt()) < 1e-5);
}

TEST_CASE("rows of a batch are runs of their own", "[saliency]") {
  const auto model = small_models().wide;
  const auto target = any_target();
  const auto embed = embeddings_of(model, some_ids());
  const auto batch = at::stack({embed, 0.5 * embed, 0 * embed + embed[3]});
  const torch::NoGradGuard no_grad;  // of the caller, whom gradients do not concern
  const auto found = embedding_gradient(model, some_ids(), target, batch);
  REQUIRE(found.values.sizes() == at::IntArrayRef({3}));
  REQUIRE(found.gradient.sizes() == at::IntArrayRef({3, kT, kE}));
  for (int64_t row = 0; row < 3; ++row) {
    const auto alone = embedding_gradient(model, some_ids(), target, batch[row].unsqueeze(0));
    CHECK(found.values[row].item<double>() ==
          Approx(plain_number(model, batch[row], target)).margin(1e-5));
    const auto largest = alone.gradient.abs().max().item<double>();
    CHECK(max_difference(found.gradient[row], alone.gradient[0]) < 1e-4 * largest);
  }
}

TEST_CASE("integrated gradients are complete", "[saliency]") {
  const auto model = small_models().wide;
  const auto target = any_target();
  const auto embed = embeddings_of(model, some_ids());
  const auto zero = at::zeros({kE});
  const auto other = embeddings_of(model, {0})[0];
  for (const bool keep : {true, false}) {
    for (const auto& baseline : {zero, other}) {
      if (!keep && baseline.equal(zero)) {
        continue;  // all tokens zero: the target jumps there
      }
      const auto found = integrated_gradients(
          model, some_ids(), target, {.baseline = baseline, .keep_first = keep, .steps = 500});
      auto start = baseline.expand({kT, kE}).clone();
      if (keep) {
        start[0] = embed[0];
        CHECK(found.scores[0].item<double>() == 0);
      }
      const auto value = plain_number(model, embed, target);
      const auto from = plain_number(model, start, target);
      CAPTURE(keep, found.steps, value, from);
      CHECK(found.value == Approx(value).margin(1e-4));
      CHECK(found.baseline == Approx(from).margin(1e-4));
      CHECK(std::abs(found.scores.sum().item<double>() - (value - from)) <
            0.01 * std::abs(value - from));
      CHECK(found.completeness_error() <= 0.005);
      CHECK(found.steps <= 500);
    }
  }
}

TEST_CASE("each token's score is its way times the mean gradient", "[saliency]") {
  const auto model = small_models().wide;
  const SaliencyTarget target{Explained::kLogit, {17, 40}};
  const auto embed = embeddings_of(model, some_ids());
  const auto start = embeddings_of(model, {7}).expand({kT, kE});
  const auto way = embed - start;
  auto sum = at::zeros({kT}, at::kDouble);
  constexpr int kPoints = 1000;
  for (int i = 0; i < kPoints; i += 50) {
    const auto places = (at::arange(i, i + 50, at::kDouble) + 0.5) / kPoints;
    const auto rows = start + places.to(at::kFloat).view({-1, 1, 1}) * way;
    sum += (embedding_gradient(model, some_ids(), target, rows).gradient * way)
               .to(at::kDouble)
               .sum(at::IntArrayRef{0, 2});
  }
  sum /= kPoints;
  const auto found = integrated_gradients(
      model,
      some_ids(),
      target,
      {.baseline = start.contiguous(), .keep_first = false, .tolerance = 1e-4, .steps = 4000});
  CHECK(max_difference(found.scores, sum) < 0.005 * sum.abs().max().item<double>());
}

TEST_CASE("gradients are as many as allowed, a pass as large", "[saliency]") {
  const auto model = small_models().wide;
  const SaliencyTarget target{Explained::kLogit, {17}};
  IntegrationOptions options{.baseline = at::zeros({kE}), .tolerance = 0, .steps = 40};
  std::vector<int64_t> done;
  options.tokens = 3 * kT;
  options.on_progress = [&](int64_t n, int64_t most) {
    CHECK(most == 40);
    done.push_back(n);
    return true;
  };
  CHECK(integrated_gradients(model, some_ids(), target, options).steps == 39);  // two at a time
  CHECK(std::vector<int64_t>(done.begin(), done.begin() + 6) ==
        std::vector<int64_t>{3, 6, 9, 12, 15, 17});
  options.tolerance = 1e30;  // the slope at zeros is steep
  options.on_progress = {};
  CHECK(integrated_gradients(model, some_ids(), target, options).steps == 17);
  options.on_progress = [](int64_t n, int64_t) { return n < 9; };
  CHECK_THAT(error_of([&] { integrated_gradients(model, some_ids(), target, options); }),
             Catch::Contains("[saliency] stopped after 9 gradients, nothing was written"));
}

TEST_CASE("what has no saliency is refused", "[saliency]") {
  const auto model = small_models().wide;
  const auto error = [&](const std::vector<int64_t>& ids, const SaliencyTarget& target) {
    return error_of([&] { gradient_times_input(model, ids, target); });
  };
  const SaliencyTarget fine{Explained::kLogit, {17}};
  CHECK_THAT(error({}, fine), Catch::Contains("[saliency] prompt: expected at least one"));
  CHECK_THAT(error({1003}, fine), Catch::Contains("expected ids from 0 to 1002, got 1003"));
  CHECK_THAT(error({5}, {Explained::kLogit}), Catch::Contains("tokens: expected 1 to 2, got 0"));
  CHECK_THAT(error({5}, {Explained::kLoss}), Catch::Contains("loss: expected at least 2 tokens"));
  CHECK_THAT(error({5, 6}, {Explained::kLoss, {17}}), Catch::Contains("expected 0 to 0, got 1"));
  CHECK_THAT(error({5}, {Explained::kLogit, {17}, 3}), Catch::Contains("position: expected -1"));
  CHECK_THAT(error_of([&] { embedding_gradient(model, {5}, fine, at::zeros({1, 2, kE})); }),
             Catch::Contains("embeddings: expected (B, 1, 128), got (1, 2, 128)"));
  const auto integrate = [&](IntegrationOptions options) {
    return error_of([&] { integrated_gradients(model, some_ids(), fine, options); });
  };
  CHECK_THAT(integrate({}), Catch::Contains("baseline: expected (128) or (21, 128), got none"));
  CHECK_THAT(integrate({.baseline = at::zeros({3, kE})}), Catch::Contains("got (3, 128)"));
  CHECK_THAT(integrate({.baseline = embeddings_of(model, some_ids())}),
             Catch::Contains("expected one that differs from the prompt"));
  CHECK_THAT(integrate({.baseline = at::zeros({kE}), .steps = 16}), Catch::Contains("at least 17"));
  CHECK_THAT(integrate({.baseline = at::zeros({kE}), .tokens = 0}), Catch::Contains("tokens"));
}
