#include "gemma_torch/engine/engine.h"

#include <ATen/Functions.h>

#include "gemma_torch/base/error.h"
#include "support/catch.h"
#include "support/golden.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

TEST_CASE("top gives the best of the last logits, the lower id of equals first", "[engine]") {
  const Tiny tiny("tiny_grouped.safetensors");
  const auto engine = make_engine(tiny.model(), {.capacity = 40, .batch = 2});
  engine->append(tiny.want.at("ids"));
  const auto logits = engine->logits(Rows::kLast).squeeze(1);
  const auto top = engine->top(9);
  CHECK(top.ids.sizes() == at::IntArrayRef({2, 9}));
  CHECK(max_difference(top.logits, std::get<0>(logits.topk(9))) == 0);
  CHECK(max_difference(logits.gather(1, top.ids), top.logits) == 0);
  CHECK(at::equal(engine->top(1).ids, top.ids.narrow(1, 0, 1)));
  CHECK(engine->top(100'000).ids.size(1) == tiny.config.vocab_size);

  auto model = tiny.model();
  model->out_head->weight.set_data(
      at::zeros_like(model->out_head->weight));  // every logit is equal
  const auto level = make_engine(model, {.capacity = 4});
  level->append(std::vector<int64_t>{7});
  CHECK(at::equal(level->top(101).ids, at::arange(101).unsqueeze(0)));
  CHECK(at::equal(level->top(5).ids, at::arange(5).unsqueeze(0)));  // equals at the last place
}

TEST_CASE("log_prob equals log_softmax of the logits", "[engine]") {
  const Tiny tiny("tiny_scaled.safetensors");
  const auto engine = make_engine(tiny.model(), {.capacity = 400, .batch = 2});
  const auto ids = tiny.want.at("ids").repeat({1, 5});  // 105 tokens: more than one block of rows
  engine->append(ids);
  const auto want =
      engine->logits(Rows::kAll).log_softmax(-1).gather(2, ids.unsqueeze(-1)).squeeze(-1);
  CHECK(max_difference(engine->log_prob(ids), want) < 1e-5);
  CHECK_THROWS_AS(engine->log_prob(ids.narrow(1, 0, 3)), Error);
}

TEST_CASE("an engine without a cache does what one with a cache does", "[engine]") {
  const Tiny tiny("tiny_grouped.safetensors");
  const auto cached = make_engine(tiny.model(), {.capacity = 40, .batch = 2});
  const auto plain = make_engine(tiny.model(), {.capacity = 40, .batch = 2, .cached = false});
  const auto ids = tiny.want.at("ids");
  for (const auto& padding : {at::Tensor(), at::tensor({2, 0}, at::kLong)}) {
    for (const auto& engine : {cached.get(), plain.get()}) {
      engine->reset(padding);
      engine->append(ids.narrow(1, 0, 7));
      engine->append(ids.narrow(1, 7, 3));
      engine->rewind(9);
      engine->append(ids.narrow(1, 3, 4));
    }
    CHECK(plain->position() == 13);
    CHECK(plain->history(0) == cached->history(0));
    CHECK(max_difference(plain->logits(Rows::kAll), cached->logits(Rows::kAll)) < kFloatTolerance);
    const auto targets = ids.narrow(1, 0, 4);
    CHECK(max_difference(plain->log_prob(targets), cached->log_prob(targets)) < kFloatTolerance);
    CHECK(at::equal(plain->top(5).ids, cached->top(5).ids));
  }
  CHECK_FALSE(plain->report(1).cached);
  CHECK_THROWS_WITH(plain->copy_from(*cached), Catch::Contains("without a cache"));
  const auto copy = make_engine(tiny.model(), {.capacity = 40, .batch = 2, .cached = false});
  copy->copy_from(*plain);
  CHECK(at::equal(copy->logits(Rows::kLast), plain->logits(Rows::kLast)));
  plain->rewind(3);
  CHECK_THROWS_WITH(plain->logits(Rows::kLast), Catch::Contains("expected an append"));
}

TEST_CASE("bad requests are refused before any work", "[engine]") {
  const Tiny tiny("tiny_grouped.safetensors");
  const auto engine = make_engine(tiny.model(), {.capacity = 8});
  CHECK_THROWS_WITH(engine->logits(Rows::kLast), Catch::Contains("expected an append"));
  CHECK_THROWS_WITH(engine->append(std::vector<int64_t>{5, 101}),
                    Catch::Contains("expected 0 to 100, got 101 (token 1 of row 0)"));
  CHECK_THROWS_AS(engine->append(std::vector<int64_t>{-1}), Error);
  CHECK_THROWS_AS(engine->append(std::vector<int64_t>{}), Error);
  CHECK_THROWS_AS(engine->append(at::zeros({2, 3}, at::kLong)), Error);
  CHECK_THROWS_AS(engine->append(at::zeros({1, 3})), Error);
  CHECK_THROWS_AS(engine->top(0), Error);
  CHECK_THROWS_AS(engine->reset(at::zeros({3}, at::kLong)), Error);
  CHECK(engine->position() == 0);
  CHECK(engine->history(0).empty());
  CHECK_THROWS_WITH(parse_engine("turbo"),
                    Catch::Contains("expected auto, eager, fused, traced or graph, got turbo"));
}

TEST_CASE("the head runs once a step, however many rows ask", "[engine]") {
  const Tiny tiny("tiny_grouped.safetensors");
  int heads = 0;
  const Probe count = [&](const At& at, const at::Tensor& x) {
    heads += at.site == Site::kLogits;
    return x;
  };
  const auto engine = make_engine(tiny.model(), {.capacity = 40, .batch = 2, .probe = count});
  engine->append(tiny.want.at("ids"));
  engine->decode(
      5, {.temperature = 1, .top_k = 4, .seed = 1}, [](int64_t, int64_t) { return true; });
  CHECK(heads == 5);
  const auto before = engine->logits(Rows::kLast);
  engine->append(tiny.want.at("ids").narrow(1, 0, 1).contiguous());
  CHECK(max_difference(engine->logits(Rows::kLast), before) >
        0);  // never those of an earlier token
  engine->rewind(engine->position() - 1);
  CHECK_THROWS_AS(engine->logits(Rows::kLast), Error);
}

TEST_CASE("the same seed gives the same tokens, another seed others", "[engine]") {
  const Tiny tiny("tiny_grouped.safetensors");
  const auto sampled = [&](uint64_t seed) {
    const auto engine = make_engine(tiny.model(), {.capacity = 80});
    engine->append(std::vector<int64_t>{2, 9, 4});
    std::vector<int64_t> ids;
    engine->decode(32,
                   {.temperature = 2, .top_k = 50, .repetition_penalty = 1.1, .seed = seed},
                   [&](int64_t, int64_t id) {
                     ids.push_back(id);
                     return true;
                   });
    return ids;
  };
  CHECK(sampled(1) == sampled(1));
  CHECK(sampled(1) != sampled(2));
}
