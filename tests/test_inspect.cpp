#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>

#include "gemma_torch/inspect/parity.h"
#include "gemma_torch/inspect/perplexity.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/golden.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

// Gives every target the log-probability -target, and remembers what it was given since each reset.
class RecordingEngine : public Engine {
 public:
  explicit RecordingEngine(int64_t capacity = 64)
      : Engine(/*batch=*/1, capacity, /*vocab_size=*/1000) {}

  EngineReport report(int64_t) const override { return {}; }
  at::Tensor logits(Rows) override { return at::zeros({1, 1, 1000}); }
  at::Tensor log_prob(const at::Tensor& targets) override {
    REQUIRE(targets.size(1) == last_length);  // one target a token of the last append
    return -targets.to(at::kFloat);
  }
  int64_t position() const override { return position_; }

  std::vector<std::vector<int64_t>> windows;
  int64_t last_length = 0;

 private:
  void do_append(const int64_t* ids, int64_t T) override {
    windows.back().insert(windows.back().end(), ids, ids + T);
    last_length = T;
    position_ += T;
  }
  void do_rewind(int64_t position) override { position_ = position; }
  void do_reset(const at::Tensor&) override {
    windows.emplace_back();
    position_ = 0;
  }
  void do_copy_from(const Engine&) override {}

  int64_t position_ = 0;
};

std::vector<int64_t> count_to(int64_t n) {
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < n; ++i) {
    ids.push_back(100 + i);
  }
  return ids;
}

std::vector<int64_t> indices(const std::vector<TokenScore>& scores) {
  std::vector<int64_t> found;
  for (const auto& score : scores) {
    found.push_back(score.index);
  }
  return found;
}

SiteParity find(const std::vector<SiteParity>& sites, const std::string& name) {
  for (const auto& site : sites) {
    if (site.site == name) {
      return site;
    }
  }
  return {.site = "absent"};
}

}  // namespace

TEST_CASE("each window scores its second half after a <bos> of its own", "[perplexity]") {
  RecordingEngine engine;
  std::vector<int64_t> progress;
  const auto scores =
      score_tokens(engine,
                   count_to(19),
                   {.chunk = 8, .bos_id = 2, .on_progress = [&](int64_t done, int64_t total) {
                      CHECK(total == 16);
                      progress.push_back(done);
                    }});
  // 8 / 2 + 1 .. 7 of both windows; the three tokens left over are dropped
  CHECK(indices(scores) == std::vector<int64_t>{5, 6, 7, 13, 14, 15});
  CHECK(scores[3].id == 113);
  CHECK(scores[3].log_prob == -113);
  CHECK(mean_nll(scores) == Approx((105 + 106 + 107 + 113 + 114 + 115) / 6.0));
  REQUIRE(engine.windows.size() == 2);
  CHECK(engine.windows[0] == std::vector<int64_t>{2, 101, 102, 103, 104, 105, 106});
  CHECK(engine.windows[1] == std::vector<int64_t>{2, 109, 110, 111, 112, 113, 114});
  CHECK(progress == std::vector<int64_t>{8, 16});
}

TEST_CASE("512 tokens give 255 scores, as llama-perplexity counts", "[perplexity]") {
  RecordingEngine engine(/*capacity=*/512);
  const auto scores = score_tokens(engine, std::vector<int64_t>(600, 7));
  CHECK(scores.size() == 255);
  CHECK(scores[0].index == 257);
}

TEST_CASE("a whole text scores every token after the first, in steps that join", "[perplexity]") {
  RecordingEngine engine(/*capacity=*/600);
  const auto scores = score_tokens(engine, count_to(600), {.chunk = 0});
  REQUIRE(scores.size() == 599);
  for (size_t i = 0; i < scores.size(); ++i) {
    REQUIRE(scores[i].index == static_cast<int64_t>(i) + 1);
    REQUIRE(scores[i].id == 101 + static_cast<int64_t>(i));
  }
  auto run = count_to(599);  // the last is predicted, not run, and nothing is overwritten
  CHECK(engine.windows == std::vector<std::vector<int64_t>>{run});
}

TEST_CASE("texts that fill no window are refused", "[perplexity]") {
  RecordingEngine engine;
  CHECK_THAT(error_of([&] { score_tokens(engine, count_to(7), {.chunk = 8}); }),
             Catch::Contains("at least one chunk of 8 tokens, got 7"));
  CHECK_THAT(error_of([&] { score_tokens(engine, count_to(1), {.chunk = 0}); }),
             Catch::Contains("at least 2 tokens, got 1"));
  CHECK_THAT(error_of([&] { score_tokens(engine, count_to(9), {.chunk = 3}); }),
             Catch::Contains("0 or at least 4"));
  CHECK_THAT(error_of([&] { score_tokens(engine, count_to(90), {.chunk = 80}); }),
             Catch::Contains("capacity of 79"));
  CHECK(engine.windows.empty());
}

TEST_CASE("scores are the log-probabilities of the model", "[perplexity][golden]") {
  const Tiny tiny("tiny_scaled.safetensors");
  const torch::NoGradGuard no_grad;
  const auto ids = tiny.want.at("ids")[0];
  const auto* data = ids.const_data_ptr<int64_t>();
  const auto engine = make_engine(tiny.model(), {.capacity = ids.numel()});
  const auto scores = score_tokens(*engine, {data, data + ids.numel()}, {.chunk = 0});
  const auto expected = tiny.want.at("logits")[0].to(at::kDouble).log_softmax(/*dim=*/-1);
  for (const auto& score : scores) {
    const auto want = expected[score.index - 1][score.id].item<double>();
    CHECK(score.log_prob == Approx(want).margin(1e-4));
  }
}

TEST_CASE("every site of a Python dump is within tolerance", "[parity][golden]") {
  const auto dump = load_safetensors(golden_path("tiny_sites.safetensors"));
  std::vector<std::string> order;
  const auto sites = compare_with_dump(Tiny("tiny_scaled.safetensors").model(),
                                       dump,
                                       [&](const SiteParity& site) { order.push_back(site.site); });
  CHECK(sites.size() == dump.size() - 1);  // all but ids
  CHECK(order.size() == sites.size());
  CHECK(order.front() == "embed");
  CHECK(order.back() == "logits");
  for (const auto& site : sites) {
    CAPTURE(site.site, site.max_abs);
    CHECK(site.ok());
    CHECK(site.mean_abs <= site.max_abs);
    CHECK(site.max_reference > 0);
  }
}

TEST_CASE("one value that is wrong fails its site and no other", "[parity][golden]") {
  const auto model = Tiny("tiny_scaled.safetensors").model();
  auto dump = load_safetensors(golden_path("tiny_sites.safetensors"));
  dump["blocks.1.z"] = dump["blocks.1.z"].clone();
  dump["blocks.1.z"].view(-1)[17] += 0.5;
  dump["blocks.0.up"] = dump["blocks.0.up"].clone();
  dump["blocks.0.up"].view(-1)[3] = std::numeric_limits<float>::quiet_NaN();
  const auto sites = compare_with_dump(model, dump);
  CHECK(find(sites, "blocks.1.z").max_abs == Approx(0.5).margin(1e-4));
  CHECK(std::isnan(find(sites, "blocks.0.up").max_abs));
  for (const auto& site : sites) {
    CAPTURE(site.site);
    CHECK(site.ok() == (site.site != "blocks.1.z" && site.site != "blocks.0.up"));
  }
}

TEST_CASE("scores are compared only where they are not masked", "[parity][golden]") {
  const auto model = Tiny("tiny_scaled.safetensors").model();
  auto dump = load_safetensors(golden_path("tiny_sites.safetensors"));
  // (B, H, T, S) of 10 tokens: layer 0 slides over 5, layer 1 sees all
  for (const char* name : {"blocks.0.scores", "blocks.1.scores"}) {
    dump[name] = dump[name].clone();
    dump[name][0][0][3][4] += 9;  // the future
  }
  dump["blocks.0.scores"][0][0][9][4] += 9;  // just outside the window
  CHECK(find(compare_with_dump(model, dump), "blocks.0.scores").ok());
  CHECK(find(compare_with_dump(model, dump), "blocks.1.scores").ok());
  dump["blocks.1.scores"][0][0][9][4] += 9;  // seen there
  CHECK_FALSE(find(compare_with_dump(model, dump), "blocks.1.scores").ok());
  dump["blocks.0.scores"][0][0][9][5] += 9;  // the oldest in the window
  CHECK_FALSE(find(compare_with_dump(model, dump), "blocks.0.scores").ok());
}

TEST_CASE("a dump of another model is refused by name", "[parity][golden]") {
  const auto model = Tiny("tiny_scaled.safetensors").model();
  const auto dump = load_safetensors(golden_path("tiny_sites.safetensors"));
  const auto error = [&](auto change) {
    auto changed = dump;
    change(changed);
    return error_of([&] { compare_with_dump(model, changed); });
  };
  CHECK_THAT(error([](TensorMap& d) { d.erase("ids"); }), Catch::Contains("has no ids"));
  CHECK_THAT(error([](TensorMap& d) { d["blocks.4.q"] = at::zeros({1}); }),
             Catch::Contains("blocks.4.q (1), which is no site of this model of 4 layers"));
  CHECK_THAT(error([](TensorMap& d) { d["blocks.0.q"] = at::zeros({1, 4, 9, 8}); }),
             Catch::Contains("blocks.0.q: expected (1, 4, 10, 8)"));
  CHECK_THAT(error([](TensorMap& d) { d["ids"] = at::full({1, 10}, 101, at::kLong); }),
             Catch::Contains("expected 0 to 100, the dump has 101 to 101"));
  CHECK_THAT(error([](TensorMap& d) { d = {{"ids", d["ids"]}}; }), Catch::Contains("no site"));
}

TEST_CASE("an engine's greedy tokens are judged by the model's own logits", "[inspect][parity]") {
  const Tiny tiny("tiny_grouped.safetensors");
  const auto ids = tiny.want.at("ids").narrow(0, 0, 1);
  const EngineOptions options{.kind = EngineKind::kEager, .capacity = 64};
  const auto same = compare_decode(*make_engine(tiny.model(), options), tiny.model(), ids, 12);
  CHECK(same.max_abs < 1e-4);
  CHECK(same.ok());
  CHECK(same.tolerance == Approx(4e-3));
  auto other = tiny.model();
  {
    const torch::NoGradGuard no_grad;
    other->final_norm->scale.add_(at::arange(other->cfg.emb_dim) * 0.1);
  }
  const auto wrong = compare_decode(*make_engine(other, options), tiny.model(), ids, 12);
  CHECK(wrong.max_abs > 0.1);
  CHECK(!wrong.ok());
  const auto small = make_engine(tiny.model(), {.kind = EngineKind::kEager, .capacity = 12});
  CHECK_THROWS_WITH(compare_decode(*small, tiny.model(), ids, 12), Catch::Contains("got 12"));
  const auto dump = dump_of(tiny.model(), ids);
  for (const auto& site : compare_with_dump(tiny.model(), dump)) {
    CHECK(site.max_abs == 0);
  }
}
