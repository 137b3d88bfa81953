#include "gemma_torch/inspect/score.h"

#include <ATen/Functions.h>

#include <cmath>
#include <limits>

#include "gemma_torch/inspect/classification_report.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/golden.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

using Ids = std::vector<int64_t>;

Ids some_ids(int64_t n, int64_t seed) {
  Ids ids;
  for (int64_t i = 0; i < n; ++i) {
    ids.push_back((i * 37 + seed * 101 + 5) % 1003);
  }
  return ids;
}

Ids joined(Ids first, const Ids& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

// The model's own word, without a cache: log-probabilities of the last n of ids, and whether each is the best.
struct Expected {
  std::vector<double> log_probs;
  bool is_greedy = true;
};

Expected expected(Gemma3Model model, const Ids& context, const Ids& continuation) {
  const torch::NoGradGuard no_grad;
  const auto ids = at::tensor(joined(context, continuation), at::kLong).unsqueeze(0);
  const auto scores = model->forward(ids)[0].to(at::kDouble).log_softmax(/*dim=*/-1);
  Expected found;
  for (size_t i = 0; i < continuation.size(); ++i) {
    const auto row = scores[static_cast<int64_t>(context.size() + i) - 1];
    found.log_probs.push_back(row[continuation[i]].item<double>());
    found.is_greedy &= row.argmax().item<int64_t>() == continuation[i];
  }
  return found;
}

void check_scores(Gemma3Model model,
                  Engine& engine,
                  const Ids& context,
                  const std::vector<Ids>& continuations) {
  const auto scores = score_continuations(engine, context, continuations);
  REQUIRE(scores.size() == continuations.size());
  for (size_t i = 0; i < scores.size(); ++i) {
    const auto want = expected(model, context, continuations[i]);
    CAPTURE(i, context.size(), continuations[i].size());
    REQUIRE(scores[i].log_probs.size() == continuations[i].size());
    double sum = 0;
    for (size_t t = 0; t < want.log_probs.size(); ++t) {
      REQUIRE(scores[i].log_probs[t] == Approx(want.log_probs[t]).margin(kFloatTolerance));
      sum += scores[i].log_probs[t];
    }
    CHECK(scores[i].total() == Approx(sum));
    CHECK(scores[i].is_greedy == want.is_greedy);
  }
}

// Continues a context with the model's own best tokens.
Ids greedy(Gemma3Model model, const Ids& context, int64_t n) {
  const auto engine = make_engine(model, {.kind = EngineKind::kEager, .capacity = 400});
  engine->append(context);
  Ids ids;
  engine->decode(n, {.temperature = 0}, [&](int64_t, int64_t id) {
    ids.push_back(id);
    return true;
  });
  return ids;
}

}  // namespace

TEST_CASE("continuations score as the model says without a cache", "[score]") {
  const auto model = small_models().wide;
  const auto best = greedy(model, some_ids(11, 1), 70);
  auto nearly = best;
  nearly.back() = (nearly.back() + 1) % 1003;
  const Ids wrong = {(best[0] + 1) % 1003};
  const auto late = joined(wrong, greedy(model, joined(some_ids(11, 1), wrong), 69));
  // one token, some, more than are appended at once; greedy to the end, up to the last token, from the second on
  const std::vector<Ids> continuations = {
      {17}, some_ids(9, 2), some_ids(150, 3), {best[0]}, best, nearly, late, some_ids(9, 2)};
  const auto engine = make_engine(model, {.kind = EngineKind::kEager, .capacity = 200});
  check_scores(model, *engine, some_ids(11, 1), continuations);
  const auto plain =
      make_engine(model, {.kind = EngineKind::kEager, .capacity = 200, .cached = false});
  check_scores(model, *plain, some_ids(11, 1), {{17}, some_ids(9, 2), best});
}

TEST_CASE("contexts of any length work, whatever the ring has lost", "[score]") {
  const auto model = small_models().wide;
  // window 8 and chunk 16: a ring of 23, with room to go back 15
  const EngineOptions options{.kind = EngineKind::kEager, .capacity = 160, .chunk = 16};
  const auto engine = make_engine(model, options);
  for (const int64_t length : {1, 7, 8, 9, 15, 16, 22, 23, 24, 90}) {
    check_scores(
        model,
        *engine,
        some_ids(length, 4),
        {some_ids(3, 5), some_ids(16, 6), some_ids(17, 7), some_ids(60, 8), {3}, some_ids(2, 9)});
  }
}

TEST_CASE("the context runs once", "[score]") {
  const auto model = small_models().wide;
  int64_t tokens = 0;
  const Probe count = [&](const At& at, const at::Tensor& x) {
    tokens += at.site == Site::kEmbed ? x.size(1) : 0;
    return x;
  };
  const auto engine =
      make_engine(model, {.kind = EngineKind::kEager, .capacity = 200, .probe = count});
  score_continuations(*engine, some_ids(100, 1), {{5}, some_ids(4, 2), some_ids(6, 3)});
  CHECK(tokens == 100 + 3 + 5);  // the last token of each is never run
}

TEST_CASE("a score depends on nothing that ran before", "[score]") {
  const auto model = small_models().rounded;
  const auto engine = make_engine(model, {.capacity = 120});
  REQUIRE(engine->report(0).engine == "fused");
  const std::vector<Ids> continuations = {some_ids(5, 2), some_ids(12, 3)};
  const auto first = score_continuations(*engine, some_ids(20, 1), continuations);
  score_continuations(*engine, some_ids(60, 4), {some_ids(50, 5)});
  const auto again = score_continuations(*engine, some_ids(20, 1), continuations);
  for (size_t i = 0; i < first.size(); ++i) {
    CHECK(first[i].log_probs == again[i].log_probs);
  }
}

TEST_CASE("the fused engine scores as the modules in float32", "[score]") {
  const auto pair = small_models();
  const auto best = greedy(pair.wide, some_ids(11, 1), 20);
  const auto engine = make_engine(pair.rounded,
                                  {.kind = EngineKind::kFused,
                                   .capacity = 200,
                                   .kv_dtype = at::kFloat,
                                   .fused = {.products = at::kFloat}});
  check_scores(pair.wide, *engine, some_ids(11, 1), {{17}, some_ids(9, 2), some_ids(150, 3), best});
}

TEST_CASE("what cannot be scored is refused before any work", "[score]") {
  const auto model = small_models().wide;
  const auto engine = make_engine(model, {.kind = EngineKind::kEager, .capacity = 10});
  engine->append(Ids{1, 2});
  const auto error = [&](const Ids& context, const std::vector<Ids>& continuations) {
    return error_of([&] { score_continuations(*engine, context, continuations); });
  };
  CHECK_THAT(error({}, {{1}}), Catch::Contains("[score] context: expected at least one token"));
  CHECK_THAT(error({1}, {{1}, {}}), Catch::Contains("continuation 1: expected at least one"));
  CHECK_THAT(error({1003}, {{1}}),
             Catch::Contains("context: expected ids from 0 to 1002, got 1003"));
  CHECK_THAT(error({1}, {{-1}}), Catch::Contains("continuation 0: expected ids from 0 to 1002"));
  CHECK_THAT(error(some_ids(5, 1), {some_ids(7, 1)}),
             Catch::Contains("capacity of 11, got 1 and 10"));
  CHECK(engine->position() == 2);
  CHECK(score_continuations(*engine, some_ids(5, 1), {some_ids(6, 1)}).size() == 1);
  const auto two = make_engine(model, {.kind = EngineKind::kEager, .capacity = 10, .batch = 2});
  CHECK_THROWS_WITH(score_continuations(*two, {1}, {{1}}), Catch::Contains("got 2 and 10"));
}

TEST_CASE("means have the standard error of their sample", "[classification]") {
  const auto found = estimate({1, 0, 0, 1, 1});
  CHECK(found.mean == Approx(0.6));
  CHECK(found.standard_error.value() == Approx(std::sqrt(0.3 / 5)));  // sample variance 1.2 / 4
  CHECK(!estimate({1}).standard_error);
  CHECK_THROWS_WITH(estimate({}), Catch::Contains("at least one"));
  CHECK(argmax({-3, -1, -1, -2}) == 1);
}

TEST_CASE("probabilities are calibrated by a text that says nothing", "[classification]") {
  const auto logs = [](const std::vector<double>& values) {
    std::vector<double> found;
    for (const auto value : values) {
      found.push_back(std::log(value) - 800);  // as unlikely as long continuations are
    }
    return found;
  };
  const auto p = normalized(logs({0.06, 0.02, 0.02}));
  CHECK(p[0] == Approx(0.6));
  CHECK(p[2] == Approx(0.2));
  // 0.6 / 0.8, 0.2 / 0.1, 0.2 / 0.1
  const auto one = calibrated(logs({0.06, 0.02, 0.02}), {logs({0.008, 0.001, 0.001})});
  CHECK(one[0] == Approx(0.75 / 4.75));
  CHECK(one[1] == Approx(2 / 4.75));
  // content-free texts count alike, however likely the labels are: mean (0.5, 0.35, 0.15)
  const auto two =
      calibrated(logs({0.06, 0.02, 0.02}), {logs({0.8, 0.1, 0.1}), logs({2e-9, 6e-9, 2e-9})});
  const double sum = 0.6 / 0.5 + 0.2 / 0.35 + 0.2 / 0.15;
  CHECK(two[0] == Approx(0.6 / 0.5 / sum));
  CHECK(two[1] == Approx(0.2 / 0.35 / sum));
  CHECK_THROWS_WITH(calibrated({1, 2}, {{1}}), Catch::Contains("expected 2, got 1"));
  CHECK_THROWS_WITH(calibrated({1, 2}, {}), Catch::Contains("at least one, got none"));
}

// Numbers of scikit-learn 1.9.1: confusion_matrix(labels=range(4)),
// precision_recall_fscore_support(labels=range(4), zero_division=0), f1_score(average="macro").
TEST_CASE("a classification report says what scikit-learn's says", "[classification]") {
  const Ids truth = {0, 0, 0, 1, 1, 1, 1, 2, 0, 1}, predicted = {0, 1, 0, 1, 1, 0, 1, 1, 0, 1};
  const auto report = classification_report(truth, predicted, 4);
  CHECK(report.confusion ==
        std::vector<Ids>{{3, 1, 0, 0}, {1, 4, 0, 0}, {0, 1, 0, 0}, {0, 0, 0, 0}});
  CHECK(report.accuracy.mean == Approx(0.7));
  CHECK(report.labels[0].precision == Approx(0.75));
  CHECK(report.labels[1].precision == Approx(4.0 / 6));
  CHECK(report.labels[1].recall == Approx(0.8));
  CHECK(report.labels[1].f1 == Approx(8.0 / 11));
  CHECK(report.labels[1].support == 5);
  CHECK(report.labels[1].predicted == 6);
  CHECK(report.labels[2].precision == 0);
  CHECK(report.labels[3].f1 == 0);
  CHECK(report.macro_f1 == Approx((0.75 + 8.0 / 11 + 0) / 3));  // no item has the fourth label
  CHECK_THROWS_WITH(classification_report({0}, {4}, 4), Catch::Contains("item 0"));
  CHECK_THROWS_WITH(classification_report({0, 1}, {1}, 4), Catch::Contains("got 2 and 1"));
}
