#include <ATen/Functions.h>
#include <torch/utils.h>

#include <functional>
#include <limits>
#include <thread>
#include <utility>

#include "gemma_torch/engine/fused.h"
#include "support/catch.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

at::Tensor some_ids(int64_t batch, int64_t length) {
  torch::manual_seed(batch * 100 + length);
  return at::randint(0, 1003, {batch, length}, at::kLong);
}

EngineOptions fused(EngineOptions options = {}) {
  options.kind = EngineKind::kFused;
  options.capacity = 96;
  return options;
}

// Everything in float32: what must equal the modules.
EngineOptions exact(int threads = 2) {
  auto options = fused();
  options.kv_dtype = at::kFloat;
  options.fused.products = at::kFloat;
  options.fused.threads = threads;
  return options;
}

double difference(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

}  // namespace

TEST_CASE("the fused engine equals the modules in float32, however the text is cut", "[fused]") {
  const auto models = small_models();
  const auto ids = some_ids(1, 60);
  const torch::NoGradGuard no_grad;
  auto wide = models.wide;
  const auto want = wide->forward(ids);
  for (const int64_t piece : {1, 5, 8, 9, 33, 60}) {
    for (const int64_t chunk : {7, 512}) {
      for (const int threads : {1, 2, 3, 5}) {
        CAPTURE(piece, chunk, threads);
        auto options = exact(threads);
        options.chunk = chunk;
        const auto engine = make_engine(models.rounded, options);
        for (int64_t start = 0; start < 60; start += piece) {
          const auto length = std::min(piece, 60 - start);
          engine->append(ids.narrow(1, start, length));
          const auto got = engine->logits(Rows::kAll);
          REQUIRE(difference(got, want.narrow(1, start, length)) < 2e-4);
        }
        CHECK(engine->position() == 60);
      }
    }
  }
}

TEST_CASE("rows of a batch give what they give alone, left padding included", "[fused]") {
  const auto models = small_models();
  const int64_t lengths[] = {3, 20, 31};
  auto options = exact();
  options.batch = 3;
  const auto together = make_engine(models.rounded, options);
  const int64_t longest = 31;
  auto ids = at::zeros({3, longest}, at::kLong);
  auto first = at::empty({3}, at::kLong);
  for (int64_t row = 0; row < 3; ++row) {
    first[row] = longest - lengths[row];
    ids[row].narrow(0, longest - lengths[row], lengths[row]).copy_(some_ids(1, lengths[row])[0]);
  }
  together->reset(first);
  together->append(ids);
  auto next = some_ids(3, 1);
  for (int step = 0; step < 12; ++step) {  // past the window
    together->append(next);
  }
  const auto got = together->logits(Rows::kLast);
  const auto best = together->top(5);
  for (int64_t row = 0; row < 3; ++row) {
    const auto alone = make_engine(models.rounded, exact());
    alone->append(some_ids(1, lengths[row]));
    for (int step = 0; step < 12; ++step) {
      alone->append(next.narrow(0, row, 1));
    }
    CAPTURE(row);
    CHECK(difference(got[row], alone->logits(Rows::kLast)[0]) < 1e-4);
    CHECK(at::equal(best.ids[row], alone->top(5).ids[0]));
  }
}

TEST_CASE("top of the two-stage head is the full head's, to the bit", "[fused]") {
  const auto models = small_models();
  FusedEngine engine(models.rounded, fused());
  auto options = fused();
  options.fused.two_stage_head = false;
  FusedEngine plain(models.rounded, options);
  int64_t spared = 0;
  for (int text = 0; text < 20; ++text) {
    engine.reset();
    plain.reset();
    const auto ids = some_ids(1, 3 + text);
    engine.append(ids);
    plain.append(ids);
    for (const int64_t k : {1, 2, 17, 64, 400, 1003, 5000}) {
      const auto got = engine.top(k);
      spared += engine.survivors() > 0 ? 1003 - engine.survivors() : 0;
      const auto want = plain.top(k);
      CAPTURE(text, k);
      REQUIRE(at::equal(got.ids, want.ids));
      REQUIRE(at::equal(got.logits, want.logits));
    }
  }
  CHECK(spared > 0);  // else it was the full head all along
}

// Long rows across the input have large bounds and logits near zero: they look best, and are not. A second look tells
// them from the best, or, where they are longer still, does not, and they are too many to be scored one by one.
TEST_CASE("top finds the best rows where others look better", "[fused]") {
  struct Case {
    int64_t first, count;
    double size;
    bool full_head;
  };
  const auto [first, count, size, full_head] =
      GENERATE(Case{300, 150, 40, false}, Case{0, 960, 400, true});
  Gemma3Model model(small_config(at::kBFloat16));
  const auto ids = some_ids(1, 9);
  const torch::NoGradGuard no_grad;
  const auto x = model->hidden(ids).to(at::kFloat)[0][8];
  auto head = at::randn({1003, 128}) * 0.01 - x / x.norm();
  auto across = at::randn({count, 128});
  across -= across.matmul(x).unsqueeze(1) * x.unsqueeze(0) / x.dot(x);
  head.narrow(0, first, count).copy_(across * size / across.norm(2, 1, true));
  const auto best = at::tensor({7, 150, 299, 700, 701, 990, 1002, 4}, at::kLong);
  for (int64_t i = 0; i < best.numel(); ++i) {
    head[best[i].item<int64_t>()].copy_(x / x.norm() * (2 + 0.1 * static_cast<double>(i)));
  }
  model->out_head->weight.copy_(head);
  for (const int threads : {1, 2, 3}) {
    auto options = fused();
    options.fused.threads = threads;
    FusedEngine engine(model, options);
    engine.append(ids);
    const auto top = engine.top(best.numel());
    CAPTURE(count, threads, engine.survivors());
    CHECK(at::equal(top.ids[0], best.flip(0)));
    CHECK((engine.survivors() == 0) == full_head);
  }
}

TEST_CASE("top of what is no number is the full head's too", "[fused]") {
  const auto models = small_models();
  const torch::NoGradGuard no_grad;
  models.rounded->final_norm->scale.fill_(std::numeric_limits<float>::quiet_NaN());
  FusedEngine engine(models.rounded, fused());
  engine.append(some_ids(1, 9));
  CHECK(engine.top(3).logits.isnan().all().item<bool>());
  CHECK(engine.survivors() == 0);
}

TEST_CASE("greedy and sampled text is the same with both heads", "[fused]") {
  const auto models = small_models();
  for (const Sampling& sampling :
       {Sampling{.temperature = 0},
        Sampling{.temperature = 1, .top_k = 20, .top_p = 0.9, .seed = 3},
        Sampling{.temperature = 0.7, .min_p = 0.02, .repetition_penalty = 1.3, .seed = 5}}) {
    std::vector<int64_t> texts[2];
    for (const bool two_stage : {false, true}) {
      auto options = fused();
      options.fused.two_stage_head = two_stage;
      const auto engine = make_engine(models.rounded, options);
      engine->append(some_ids(1, 9));
      engine->decode(40, sampling, [&](int64_t, int64_t id) {
        texts[two_stage].push_back(id);
        return true;
      });
    }
    CHECK(texts[0] == texts[1]);
    CHECK(texts[0].size() == 40);
  }
}

TEST_CASE("rewind, reset and copy_from of the fused engine", "[fused]") {
  const auto models = small_models();
  const auto ids = some_ids(1, 40);
  const auto engine = make_engine(models.rounded, exact());
  engine->append(ids);
  const auto want = engine->logits(Rows::kLast).clone();
  engine->rewind(25);
  CHECK_THROWS_WITH(engine->logits(Rows::kLast), Catch::Contains("expected an append"));
  engine->append(ids.narrow(1, 25, 15));
  CHECK(difference(engine->logits(Rows::kLast), want) < 1e-4);
  const auto other = make_engine(models.rounded, exact());
  other->copy_from(*engine);
  CHECK(at::equal(other->logits(Rows::kLast), engine->logits(Rows::kLast)));
  other->append(some_ids(1, 1));
  engine->append(some_ids(1, 1));
  CHECK(at::equal(other->logits(Rows::kLast), engine->logits(Rows::kLast)));
  engine->reset();
  engine->append(ids);
  CHECK(at::equal(engine->logits(Rows::kLast), want));
}

TEST_CASE("logits of all tokens end in those of the last, to the bit", "[fused]") {
  const auto models = small_models();
  for (const int64_t length : {1, 32, 33, 70}) {  // of two rows: up to three times 64 at once
    auto options = fused();
    options.batch = 2;
    options.fused.threads = 1;  // whose part of the head is read in several pieces
    const auto engine = make_engine(models.rounded, options);
    engine->append(some_ids(2, length));
    CAPTURE(length);
    CHECK(at::equal(engine->logits(Rows::kAll).narrow(1, length - 1, 1),
                    engine->logits(Rows::kLast)));
  }
}

TEST_CASE("log_prob of the fused engine equals the logits' own", "[fused]") {
  const auto models = small_models();
  const auto ids = some_ids(2, 37), targets = some_ids(2, 37).flip(1);
  for (const auto products : {at::kFloat, at::kBFloat16}) {
    auto options = exact();
    options.batch = 2;
    options.fused.products = products;
    const auto engine = make_engine(models.rounded, options);
    engine->append(ids);
    const auto want =
        engine->logits(Rows::kAll).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1);
    CHECK(difference(engine->log_prob(targets), want) < 1e-4);
  }
}

TEST_CASE("every instruction set of this CPU gives the generic one's numbers", "[fused]") {
  const auto models = small_models();
  const auto ids = some_ids(1, 50);
  for (const auto quant : {OnTheFly::kNone, OnTheFly::kInt8}) {
    at::Tensor want;
    for (const auto isa : kernels::usable_isas()) {
      auto options = exact();
      options.fused.isa = isa;
      options.fused.quant = quant;
      const auto engine = make_engine(models.rounded, options);
      engine->append(ids);
      engine->append(some_ids(1, 1));
      const auto got = engine->logits(Rows::kLast);
      want = want.defined() ? want : got;  // generic comes first
      CAPTURE(kernels::isa_name(isa));
      CHECK(engine->report(0).isa == kernels::isa_name(isa));
      CHECK(difference(got, want) < 2e-4);
    }
  }
}

TEST_CASE("bfloat16 products and keys, and int8 layers, are near the exact result", "[fused]") {
  const auto models = small_models();
  const auto ids = some_ids(1, 50);
  const auto run = [&](const EngineOptions& options) {
    const auto engine = make_engine(models.rounded, options);
    engine->append(ids);
    return engine->logits(Rows::kAll).log_softmax(-1);
  };
  const auto want = run(exact());
  const auto kl = [&](const at::Tensor& got) {
    return (want.exp() * (want - got)).sum(-1).mean().item<double>();
  };
  auto rounded = exact();
  rounded.kv_dtype = at::kBFloat16;
  rounded.fused.products = at::kBFloat16;
  auto coarse = exact();
  coarse.fused.quant = OnTheFly::kInt8;
  const double by_rounding = kl(run(rounded)), by_int8 = kl(run(coarse));
  CAPTURE(by_rounding, by_int8);
  CHECK(by_rounding > 0);
  CHECK(by_rounding < 0.02);
  CHECK(by_int8 > 0);
  CHECK(by_int8 < 0.02);
}

TEST_CASE("the fused engine notices changed weights", "[fused]") {
  const auto models = small_models();
  const auto ids = some_ids(1, 12);
  const auto engine = make_engine(models.rounded, exact());
  engine->append(ids);
  const torch::NoGradGuard no_grad;
  auto rounded = models.rounded, wide = models.wide;
  auto& weight = rounded->blocks->at<TransformerBlockImpl>(1).ff->fc1->weight;
  auto& wide_weight = wide->blocks->at<TransformerBlockImpl>(1).ff->fc1->weight;
  const auto rows = weight.size(0);
  const auto both = at::cat({weight * 4, weight * 8});
  const std::pair<const char*, std::function<void()>> changes[] = {
      {"in place", [&] { weight.mul_(2); }},
      {"another storage", [&] { weight.set_data(both.narrow(/*dim=*/0, 0, rows)); }},
      {"another place of the same", [&] { weight.set_data(both.narrow(/*dim=*/0, rows, rows)); }}};
  for (const auto& [what, change] : changes) {
    CAPTURE(what);
    change();
    wide_weight.mul_(2);
    engine->reset();
    engine->append(ids);
    CHECK(difference(engine->logits(Rows::kAll), wide->forward(ids)) < 2e-4);
  }
}

TEST_CASE("fused engines share weights packed before, and refuse those that do not fit",
          "[fused]") {
  const auto models = small_models();
  const auto ids = some_ids(1, 12);
  const auto logits = [&](Engine& engine) {
    engine.reset();
    engine.append(ids);
    return engine.logits(Rows::kAll);
  };
  const auto want = logits(*make_engine(models.rounded, exact()));
  auto options = exact();
  const auto pack = std::make_shared<const Pack>(models.rounded, kernels::Format::kLossless12, 2);
  options.fused.pack = pack;
  const auto first = make_engine(models.rounded, options);
  const auto second = make_engine(models.rounded, options);
  CHECK(pack.use_count() == 4);  // these two, `options` and `pack`
  CHECK(at::equal(logits(*first), want));
  CHECK(at::equal(logits(*second), want));

  CHECK_THROWS_WITH(make_engine(small_models().rounded, options),
                    Catch::Contains("[fused] pack") && Catch::Contains("another model"));
  auto three = options;
  three.fused.threads = 3;
  CHECK_THROWS_WITH(make_engine(models.rounded, three),
                    Catch::Contains("for 3 threads, got one in lossless12 for 2"));
  auto coarse = options;
  coarse.fused.quant = OnTheFly::kInt8;
  CHECK_THROWS_WITH(make_engine(models.rounded, coarse),
                    Catch::Contains("in int8 for 2 threads, got one in lossless12"));

  const torch::NoGradGuard no_grad;
  auto rounded = models.rounded;
  const auto owners = pack.use_count();
  rounded->final_norm->scale.add_(1);
  CHECK_FALSE(at::equal(logits(*first), want));
  CHECK(pack.use_count() == owners - 1);  // it has one of its own now
}

TEST_CASE("what the fused engine cannot run is refused, and auto goes round it", "[fused]") {
  const auto models = small_models();
  CHECK(choose_engine(models.rounded, {}) == EngineKind::kFused);
  CHECK(choose_engine(models.wide, {}) == EngineKind::kEager);
  CHECK_THROWS_WITH(make_engine(models.wide, fused()),
                    Catch::Contains("[fused]") && Catch::Contains("--engine eager"));
  auto odd = small_config(at::kBFloat16);
  odd.hidden_dim = 200;
  CHECK_THROWS_WITH(make_engine(Gemma3Model(odd), fused()),
                    Catch::Contains("hidden_dim 200 is not a multiple of 64"));
  auto probed = fused();
  probed.probe = [](const At&, const at::Tensor& x) { return x; };
  CHECK_THROWS_WITH(make_engine(models.rounded, probed), Catch::Contains("probes"));
  probed.kind = EngineKind::kAuto;
  CHECK(choose_engine(models.rounded, probed) == EngineKind::kEager);
}

TEST_CASE("two fused engines run in two threads", "[fused]") {
  const auto models = small_models();
  const auto ids = some_ids(1, 20);
  std::vector<int64_t> texts[2];
  const auto run = [&](std::vector<int64_t>& text) {
    const auto engine = make_engine(models.rounded, exact());
    for (int round = 0; round < 5; ++round) {
      engine->reset();
      engine->append(ids);
      engine->decode(20, {.temperature = 0}, [&](int64_t, int64_t id) {
        text.push_back(id);
        return true;
      });
    }
  };
  std::thread other([&] { run(texts[1]); });
  run(texts[0]);
  other.join();
  CHECK(texts[0] == texts[1]);
  CHECK(texts[0].size() == 100);
}
