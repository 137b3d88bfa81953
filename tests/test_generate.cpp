#include "gemma_torch/generate/generate.h"

#include <ATen/Functions.h>

#include "gemma_torch/base/error.h"
#include "support/catch.h"

using namespace gemma_torch;

namespace {

// Says after token i that i + 1 comes next (modulo the vocabulary), and counts what it was given.
class CountingEngine : public Engine {
 public:
  explicit CountingEngine(int64_t batch = 1, int64_t capacity = 64)
      : Engine(batch, capacity, /*vocab_size=*/20) {}

  EngineReport report(int64_t) const override { return {}; }
  at::Tensor logits(Rows) override {
    return at::one_hot((last + 1) % 20, 20).to(at::kFloat).unsqueeze(1);
  }
  at::Tensor log_prob(const at::Tensor& targets) override {
    return at::zeros_like(targets, at::kFloat);
  }
  int64_t position() const override { return position_; }

  at::Tensor last, first;
  std::vector<int64_t> lengths;  // of each append

 private:
  void do_append(const int64_t* ids, int64_t T) override {
    last = at::empty({batch()}, at::kLong);
    for (int64_t row = 0; row < batch(); ++row) {
      last[row] = ids[(row + 1) * T - 1];
    }
    lengths.push_back(T);
    position_ += T;
  }
  void do_rewind(int64_t position) override { position_ = position; }
  void do_reset(const at::Tensor& padding) override {
    position_ = 0;
    first = padding;
  }
  void do_copy_from(const Engine&) override {}

  int64_t position_ = 0;
};

constexpr Sampling kGreedy{.temperature = 0};

}  // namespace

TEST_CASE("generation ends at length, at a stop id, and where the callback says", "[generate]") {
  CountingEngine engine;
  auto result = generate(engine, {{3, 4}}, {.max_new_tokens = 3, .sampling = kGreedy});
  CHECK(result.rows[0].ids == std::vector<int64_t>{5, 6, 7});
  CHECK(result.rows[0].finish == FinishReason::kLength);
  CHECK(result.prompt_tokens == 2);
  CHECK(engine.lengths == std::vector<int64_t>{2, 1, 1});  // the last token is not run

  engine.reset();
  result = generate(engine, {{3}}, {.max_new_tokens = 9, .sampling = kGreedy, .stop_ids = {1, 6}});
  CHECK(result.rows[0].ids == std::vector<int64_t>{4, 5, 6});
  CHECK(result.rows[0].finish == FinishReason::kStop);

  engine.reset();
  result =
      generate(engine, {{3}}, {.max_new_tokens = 9, .sampling = kGreedy}, [](int64_t, int64_t id) {
        return id != 5;
      });
  CHECK(result.rows[0].ids == std::vector<int64_t>{4, 5});
  CHECK(result.rows[0].finish == FinishReason::kCallback);
  CHECK(std::string(finish_name(FinishReason::kCallback)) == "callback");
}

TEST_CASE("rows of a batch are padded on the left and end by themselves", "[generate]") {
  CountingEngine engine(/*batch=*/3);
  const auto result = generate(engine,
                               {{1, 2, 3}, {8}, {4, 5}},
                               {.max_new_tokens = 4, .sampling = kGreedy, .stop_ids = {10}});
  CHECK(at::equal(engine.first, at::tensor({0, 2, 1}, at::kLong)));
  CHECK(result.rows[0].ids == std::vector<int64_t>{4, 5, 6, 7});
  CHECK(result.rows[1].ids == std::vector<int64_t>{9, 10});
  CHECK(result.rows[1].finish == FinishReason::kStop);
  CHECK(result.rows[2].ids == std::vector<int64_t>{6, 7, 8, 9});
  CHECK(engine.history(1)[0] == 8);  // padding is no history
  CHECK(result.prompt_tokens == 6);
}

TEST_CASE("impossible requests are refused before any work", "[generate]") {
  CountingEngine engine(/*batch=*/1, /*capacity=*/8);
  CHECK_THROWS_WITH(generate(engine, {{}}, {}), Catch::Contains("expected at least one token"));
  CHECK_THROWS_WITH(generate(engine, {{1, 2, 3}}, {.max_new_tokens = 7}),
                    Catch::Contains("expected to fit 8"));
  CHECK_THROWS_AS(generate(engine, {{1}, {2}}, {}), Error);
  CHECK_THROWS_AS(generate(engine, {{1}}, {.max_new_tokens = 0}), Error);
  CHECK_THROWS_AS(generate(engine, {{1}}, {.max_new_tokens = 2, .sampling = {.temperature = -2}}),
                  Error);
  CHECK(engine.lengths.empty());
}

TEST_CASE("a turn appends only its own tokens and the one left over", "[generate][session]") {
  CountingEngine engine;
  Session session(engine);
  session.turn({1, 2, 3}, {.max_new_tokens = 2, .sampling = kGreedy});
  CHECK(engine.lengths == std::vector<int64_t>{3, 1});
  CHECK(session.pending() == 1);
  session.close({9});
  const auto result = session.turn({7, 7}, {.max_new_tokens = 1, .sampling = kGreedy});
  CHECK(result.prompt_tokens == 4);  // left over, closing, two of its own
  CHECK(engine.history(0) == std::vector<int64_t>{1, 2, 3, 4, 5, 9, 7, 7});
  CHECK(session.room() == 64 - 8 - 1);
}

TEST_CASE("a repetition penalty reaches tokens past the k best", "[generate][sampling]") {
  CountingEngine engine;  // logit 1 for the token after the last, 0 for the 19 others
  engine.append(std::vector<int64_t>{5, 6});
  CHECK(engine.candidates(0, {.temperature = 0}).size() == 1);
  const auto found = engine.candidates(0, {.temperature = 1, .top_k = 2, .repetition_penalty = 4});
  CHECK(found.size() == 20);  // the second best has 18 equals, which all stay
  CHECK(found[0].id == 7);
  engine.append(std::vector<int64_t>{7, 6});  // now 7 is in the sequence
  CHECK(engine.candidates(0, {.temperature = 0, .repetition_penalty = 4})[0].logit == 0.25F);
}
