#include "gemma_torch/inspect/kl.h"

#include <ATen/Functions.h>

#include <cmath>
#include <filesystem>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/inspect/surprisal.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/scratch.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

std::vector<int64_t> some_ids(int64_t n) {
  std::vector<int64_t> ids = {2};
  for (int64_t i = 1; i < n; ++i) {
    ids.push_back((i * 37 + 5) % 1003);
  }
  return ids;
}

std::unique_ptr<Engine> eager(Gemma3Model model, int64_t capacity) {
  return make_engine(model, {.kind = EngineKind::kEager, .capacity = capacity});
}

/// ln p after each token of ids, (T, V) float64, by the modules without a cache.
at::Tensor log_p_of(Gemma3Model model, const std::vector<int64_t>& ids) {
  const torch::NoGradGuard no_grad;
  return model->forward(at::tensor(ids, at::kLong).unsqueeze(0))
      .squeeze(0)
      .to(at::kDouble)
      .log_softmax(-1);
}

PositionDivergence position(double kl, double p, double q, bool same) {
  return {kl, std::log(p), std::log(q), same};
}

}  // namespace

TEST_CASE("sliding windows score every token after the first once", "[windows]") {
  const WindowOptions options{.chunk = 8, .sliding = true};
  for (const int64_t length : {2, 7, 8, 9, 12, 13, 20, 21}) {
    CAPTURE(length);
    std::vector<int64_t> all;
    for (int64_t i = 1; i < length; ++i) {
      all.push_back(i);
    }
    CHECK(scored_tokens(length, options) == all);
  }
  CHECK(window_tokens(5, options) == 4);
  CHECK(window_tokens(50, options) == 7);
}

TEST_CASE("a later sliding window sees half a window of context and BOS", "[windows]") {
  auto model = small_models().wide;
  const auto ids = some_ids(15);
  const auto engine = eager(model, 7);
  const auto scores =
      score_tokens(*engine, ids, {.chunk = 8, .bos_id = 3, .sliding = true, .step = 3});
  REQUIRE(scores.size() == 14);
  const auto check_window = [&](int64_t begin, int64_t end, int64_t first, bool overwritten) {
    std::vector<int64_t> window(ids.begin() + begin, ids.begin() + end);
    window[0] = overwritten ? 3 : window[0];
    const auto want = log_p_of(model, window);
    for (auto i = first; i < end; ++i) {
      CAPTURE(begin, i);
      const auto& score = scores[static_cast<size_t>(i - 1)];
      CHECK(score.index == i);
      CHECK(score.id == ids[static_cast<size_t>(i)]);
      CHECK(score.log_prob == Approx(want[i - begin - 1][score.id].item<double>()).margin(1e-5));
    }
  };
  check_window(0, 8, 1, false);
  check_window(4, 12, 8, true);
  check_window(8, 15, 12, true);
}

TEST_CASE("probabilities of a large vocabulary sum to 1", "[divergence]") {
  torch::manual_seed(4);
  auto logits = at::randn({3, 262'144}) * 2;
  logits.select(1, 0).fill_(16);  // beside which float32 sums lose all others one by one
  const auto log_p = log_normalized(logits);
  CHECK((log_p.to(at::kDouble).exp().sum(-1) - 1).abs().max().item<double>() < 2e-7);
  const auto few = at::tensor({1.0, 2.0, 3.0}).to(at::kFloat).view({1, 3});
  CHECK(log_normalized(few).allclose(few.log_softmax(-1)));
}

TEST_CASE("KL of two known distributions", "[divergence]") {
  const auto p = at::tensor({0.5, 0.25, 0.25, 0.1, 0.2, 0.7}).view({2, 3}).to(at::kFloat).log();
  const auto q = at::tensor({0.25, 0.5, 0.25, 0.2, 0.1, 0.7}).view({2, 3}).to(at::kFloat).log();
  const auto found = diverge(p, q, at::tensor({1, 2}, at::kLong));
  REQUIRE(found.size() == 2);
  CHECK(found[0].kl == Approx(0.5 * std::log(2) + 0.25 * std::log(0.5)));
  CHECK(found[1].kl == Approx(0.1 * std::log(0.5) + 0.2 * std::log(2)));
  CHECK_FALSE(found[0].same_top);
  CHECK(found[1].same_top);
  CHECK(std::exp(found[0].reference_log_prob) == Approx(0.25));
  CHECK(std::exp(found[0].other_log_prob) == Approx(0.5));
}

TEST_CASE("a summary has means, standard errors and percentiles", "[divergence]") {
  const auto found = summarize({position(0.1, 0.5, 0.4, true),
                                position(0.4, 0.2, 0.5, false),
                                position(0.2, 0.1, 0.1, true),
                                position(0.3, 0.8, 0.6, true)});
  CHECK(found.positions == 4);
  CHECK(found.kl.mean.value == Approx(0.25));
  CHECK(found.kl.mean.error == Approx(std::sqrt(0.0125 / 3)));
  CHECK(found.kl.median == Approx(0.25));
  CHECK(found.kl.p90 == Approx(0.37));
  CHECK(found.kl.p95 == Approx(0.385));
  CHECK(found.kl.p99 == Approx(0.397));
  CHECK(found.kl.max == Approx(0.4));
  CHECK(found.same_top.value == 0.75);
  CHECK(found.same_top.error == Approx(std::sqrt(0.75 * 0.25 / 3)));
  CHECK(found.delta_p.value == Approx((-0.1 + 0.3 - 0.2) / 4).margin(1e-12));
  const double squares[] = {0.01, 0.09, 0, 0.04};  // mean 0.035
  double spread = 0;
  for (const auto square : squares) {
    spread += (square - 0.035) * (square - 0.035) / 4;
  }
  CHECK(found.rms_delta_p.value == Approx(std::sqrt(0.035)));
  CHECK(found.rms_delta_p.error == Approx(std::sqrt(spread / 3) / (2 * std::sqrt(0.035))));
  CHECK(found.reference_nll.value == Approx(-std::log(0.5 * 0.2 * 0.1 * 0.8) / 4));
  CHECK(found.other_nll.value == Approx(-std::log(0.4 * 0.5 * 0.1 * 0.6) / 4));
  CHECK(found.nll_difference.value == Approx(found.other_nll.value - found.reference_nll.value));
  CHECK(found.nll_difference.error > 0);
  CHECK(summarize({position(0.1, 0.5, 0.4, true)}).kl.mean.error == 0);
  CHECK_THAT(error_of([] { summarize({}); }), Catch::Contains("expected positions, got none"));
}

TEST_CASE("saved distributions are read back to what their codes allow", "[kl]") {
  const ScratchFolder folder("gemma_kl");
  auto model = small_models().wide;
  const auto ids = some_ids(90);
  for (const int64_t chunk : {0, 40}) {
    CAPTURE(chunk);
    const WindowOptions windows{.chunk = chunk, .bos_id = 2};
    const auto report =
        save_distributions(*eager(model, 96), ids, {windows, {{"model", "small"}}}, folder / "x");
    const auto P = chunk == 0 ? 89 : 2 * 19;
    CHECK(report.positions == P);
    CHECK(report.bytes == std::filesystem::file_size(folder / "x"));
    const auto scores = score_tokens(*eager(model, 96), ids, windows);
    CHECK(report.nll == Approx(mean_nll(scores)).epsilon(1e-6));
    const SavedDistributions saved(folder / "x");
    CHECK(saved.ids() == ids);
    CHECK(saved.positions() == P);
    CHECK(saved.vocab_size() == 1003);
    CHECK(saved.metadata().at("model") == "small");
    const auto log_p = saved.log_p(0, P).to(at::kDouble);
    CHECK((log_p.exp().sum(-1) - 1).abs().max().item<double>() < 1e-5);
    if (chunk == 0) {
      const auto want = log_p_of(model, ids).narrow(0, 0, P);
      const auto half = want.neg().sqrt() / 8192;  // of a step
      const auto shift =
          (want.exp() * half).sum(-1, /*keepdim=*/true);  // of a row made to sum to 1
      const auto loss = half + shift + 1e-5;              // and float32's rounding
      CHECK(((log_p - want).abs() - loss).max().item<double>() < 0);
    }
    for (size_t i = 0; i < scores.size(); ++i) {
      const auto row = static_cast<int64_t>(i);
      CHECK(log_p[row][scores[i].id].item<double>() == Approx(scores[i].log_prob).margin(5e-4));
    }
  }
}

TEST_CASE("an engine compared with its own file is at the codes' floor", "[kl]") {
  const ScratchFolder folder("gemma_kl_self");
  auto models = small_models();
  const auto ids = some_ids(90);
  save_distributions(*eager(models.wide, 90), ids, {.windows = {.chunk = 0}}, folder / "x");
  const SavedDistributions saved(folder / "x");
  int64_t last = 0;
  const auto self =
      compare_with_saved(*eager(models.wide, 90), saved, [&](int64_t done, int64_t total) {
        CHECK(total == 89);
        CHECK(done == std::min<int64_t>(last + 32, 89));
        last = done;
      });
  CHECK(last == 89);
  const auto floor = summarize(self);
  CHECK(std::abs(floor.kl.mean.value) < 3e-8);
  CHECK(floor.same_top.value > 0.97);  // codes of near equals may be the same
  const auto fused = make_engine(models.rounded, {.kind = EngineKind::kFused, .capacity = 90});
  const auto other = summarize(compare_with_saved(*fused, saved));
  const auto direct = compare_distributions(*eager(models.wide, 90), *fused, {ids}, {});
  CHECK(other.positions == direct.positions);
  CHECK(direct.kl.mean.value > 1e-6);
  CHECK(other.kl.mean.value == Approx(direct.kl.mean.value).epsilon(0.02));
  CHECK(other.rms_delta_p.value == Approx(direct.rms_delta_p.value).epsilon(0.05));
  CHECK(other.other_nll.value == Approx(direct.other_nll.value).epsilon(1e-6));
}

TEST_CASE("saving that was cut anywhere goes on to the same bytes", "[kl]") {
  const ScratchFolder folder("gemma_kl_part");
  const auto path = folder / "x";
  auto models = small_models();
  const auto ids = some_ids(170);
  // A later run has an engine of its own, which has not seen what was done.
  const auto save = [&](bool fused, const SaveOptions& options) {
    const auto engine =
        fused ? make_engine(models.rounded, {.kind = EngineKind::kFused, .capacity = 169})
              : eager(models.wide, 169);
    return save_distributions(*engine, ids, options, path);
  };
  for (const int kind : {0, 1, 2, 3}) {
    const bool fused = kind % 2 == 1;
    const auto chunk = kind < 2 ? 78 : 0;
    const auto parts = kind < 2 ? 4 : 6;  // two windows of 32 and 6 positions; 32, 32, .., 9
    SaveOptions options{.windows = {.chunk = chunk}};
    const auto whole = save(fused, options);
    const auto bytes = read_file(path);
    for (int cut = 0; cut < parts; ++cut) {
      CAPTURE(fused, chunk, cut);
      std::filesystem::remove(path);
      SavedPart noted;
      int told = 0;
      options.from = SavedPart{};
      options.on_part = [&](const SavedPart& part) {
        check(told++ < cut, "cut");  // with the part in the file, and no note of it
        noted = part;
      };
      CHECK(error_of([&] { save(fused, options); }) == "cut");
      CHECK_FALSE(std::filesystem::exists(path));
      std::filesystem::resize_file(part_path(path),
                                   std::filesystem::file_size(part_path(path)) - 3);
      told = 0;
      options.from = noted;
      options.on_part = [&](const SavedPart&) { ++told; };
      const auto report = save(fused, options);
      CHECK(told == parts - cut);
      CHECK(report.nll == whole.nll);
      CHECK(report.positions == whole.positions);
      CHECK(report.bytes == bytes.size());
      CHECK(read_file(path) == bytes);
      CHECK_FALSE(std::filesystem::exists(part_path(path)));
    }
  }
}

TEST_CASE("windows are gone on with at a step, and nowhere else", "[windows]") {
  auto model = small_models().wide;
  const auto engine = eager(model, 8);
  const auto visited = [&](int64_t skip) {
    std::vector<int64_t> first;
    run_windows(*engine, some_ids(20), {.chunk = 9, .step = 3, .skip = skip}, [&](auto at, auto) {
      first.push_back(at);
    });
    return first;
  };
  CHECK(visited(0) == std::vector<int64_t>{5, 8, 14, 17});
  CHECK(visited(3) == std::vector<int64_t>{8, 14, 17});
  CHECK(visited(4) == std::vector<int64_t>{14, 17});
  CHECK(visited(7) == std::vector<int64_t>{17});
  CHECK(visited(8).empty());
  CHECK_THAT(error_of([&] { visited(5); }),
             Catch::Contains("[windows] skip: expected whole steps of 3 tokens, got 5"));
}

TEST_CASE("what cannot be saved or compared is named", "[kl]") {
  const ScratchFolder folder("gemma_kl_errors");
  auto model = small_models().wide;
  const auto ids = some_ids(40);
  const auto engine = eager(model, 40);
  const SaveOptions whole_text{.windows = {.chunk = 0}};
  auto stopping = whole_text;
  stopping.windows.on_progress = [](int64_t done, int64_t) { check(done < 33, "stop"); };
  const auto stopped = error_of([&] { save_distributions(*engine, ids, stopping, folder / "x"); });
  CHECK(stopped == "stop");
  CHECK(std::filesystem::is_empty(folder.path()));
  CHECK_THAT(error_of([&] { save_distributions(*engine, {2}, whole_text, folder / "x"); }),
             Catch::Contains("at least 2 tokens"));
  save_distributions(*engine, ids, whole_text, folder / "x");
  auto cfg = small_config(at::kFloat);
  cfg.vocab_size = 1002;
  const auto other = eager(Gemma3Model(cfg), 40);
  CHECK_THAT(error_of([&] { compare_with_saved(*other, SavedDistributions(folder / "x")); }),
             Catch::Contains("expected 1003 tokens, as the file has, got 1002"));
  const auto codes = at::zeros({38, 5}, at::kInt).to(at::kUInt16);
  const auto index = at::arange(1, 40, at::kLong);
  const auto written = [&](TensorMap tensors, const Metadata& metadata) {
    save_safetensors(folder / "y", tensors, metadata);
    return error_of([&] { SavedDistributions(folder / "y"); });
  };
  const auto all = at::tensor(ids, at::kLong);
  const Metadata whole = {{"chunk", "0"}, {"bos_id", "2"}};
  CHECK_THAT(written({{"ids", all}}, whole), Catch::Contains("without its tensor codes"));
  CHECK_THAT(written({{"ids", all}, {"index", index}, {"codes", codes}}, whole),
             Catch::Contains("expected the 39 positions") && Catch::Contains("got 39 of 38 rows"));
  CHECK_THAT(written({{"ids", all}, {"index", index}, {"codes", codes}}, {{"chunk", "0"}}),
             Catch::Contains("bos_id: expected a number"));
  const auto more = at::zeros({39, 5}, at::kInt).to(at::kUInt16);
  CHECK_THAT(written({{"ids", all}, {"index", index}, {"codes", more}}, whole),
             Catch::Contains("expected ids from 0 to 4, got"));
  CHECK_THAT(written({{"ids", all}, {"index", index + 1}, {"codes", more}}, whole),
             Catch::Contains("expected the 39 positions"));
}

TEST_CASE("surprisal, entropy and rank are those of the distribution", "[surprisal]") {
  auto model = small_models().wide;
  const auto ids = some_ids(70);
  const auto found = surprisals(*eager(model, 70), ids, {.chunk = 0});
  REQUIRE(found.size() == 69);
  const auto log_p = log_p_of(model, ids);
  for (size_t i = 0; i < found.size(); ++i) {
    CAPTURE(i);
    const auto row = log_p[static_cast<int64_t>(i)];
    const auto own = row[ids[i + 1]].item<double>();
    CHECK(found[i].score.index == static_cast<int64_t>(i) + 1);
    CHECK(found[i].score.id == ids[i + 1]);
    CHECK(found[i].bits == Approx(-own / std::log(2)).margin(1e-4));
    CHECK(found[i].entropy_bits ==
          Approx(-(row.exp() * row).sum().item<double>() / std::log(2)).margin(1e-4));
    const auto above = row.gt(own + 1e-5).sum().item<int64_t>();
    const auto not_below = row.gt(own - 1e-5).sum().item<int64_t>();
    CHECK(found[i].rank > above);
    CHECK(found[i].rank <= not_below);
  }
}
