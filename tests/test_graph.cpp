// The graph engine's bookkeeping and the sampling on the device, on the CPU, where a recorder replays the work itself:
// all of it but the capture.

#include "gemma_torch/engine/graph.h"

#include <ATen/Functions.h>
#include <ATen/record_function.h>

#include <limits>
#include <set>

#include "gemma_torch/base/error.h"
#include "support/catch.h"
#include "support/decoding.h"
#include "support/golden.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

int recordings = 0;

// Does for real what the recorder of CUDA does before it captures.
Replay recorder(const Work& work, const Work& restore) {
  ++recordings;
  for (int i = 0; i < 3; ++i) {
    restore();
    work();
  }
  restore();
  return work;
}

std::unique_ptr<GraphEngine> graph_engine(Gemma3Model model, const EngineOptions& options) {
  return std::make_unique<GraphEngine>(std::move(model), options, recorder);
}

}  // namespace

TEST_CASE("launches of any length make the host loop's tokens", "[graph]") {
  const auto model = small_models().wide;
  const auto prompt = (at::arange(2 * 11) * 37 % 1000).view({2, 11});
  const auto padding = at::tensor({0, 3}, at::kLong);
  for (const auto& sampling : kSamplings) {
    CAPTURE(sampling.seed, sampling.top_k, sampling.top_p, sampling.repetition_penalty);
    const auto host = make_engine(model, {.kind = EngineKind::kEager, .capacity = 64, .batch = 2});
    host->reset(padding);
    host->append(prompt);
    const auto want = decoded(*host, 30, sampling);
    const std::set<int64_t> different(want.rows[0].begin(), want.rows[0].end());
    const bool may_repeat = sampling.temperature == 0 || sampling.repetition_penalty < 1;
    CHECK((may_repeat || different.size() > 3));
    for (const int64_t steps : {1, 4, 8}) {
      CAPTURE(steps);
      const auto engine = graph_engine(model, {.capacity = 64, .batch = 2, .launch_steps = steps});
      engine->reset(padding);
      engine->append(prompt);
      CHECK(decoded(*engine, 30, sampling).rows == want.rows);
      CHECK(engine->position() == host->position());
      CHECK(engine->history(0) == host->history(0));
      CHECK(engine->history(1) == host->history(1));
      CHECK(max_difference(engine->logits(Rows::kLast), host->logits(Rows::kLast)) <
            kFloatTolerance);
    }
  }
}

TEST_CASE("a decode that ends within a launch leaves what the host loop leaves", "[graph]") {
  const auto model = small_models().wide;
  const auto prompt = (at::arange(9) * 31 % 1000).view({1, 9});
  const Sampling sampling{.temperature = 1, .top_k = 30, .seed = 11};
  const auto host = make_engine(model, {.kind = EngineKind::kEager, .capacity = 64});
  const auto engine = graph_engine(model, {.capacity = 64, .launch_steps = 8});
  for (const size_t most : {1U, 2U, 5U, 9U, 12U}) {
    CAPTURE(most);
    for (Engine* one : {host.get(), static_cast<Engine*>(engine.get())}) {
      one->reset();
      one->append(prompt);
    }
    const auto want = decoded(*host, 20, sampling, {most});
    const auto told = decoded(*engine, 20, sampling, {most});
    CHECK(told.rows == want.rows);
    CHECK(engine->position() == host->position());
    CHECK(engine->history(0) == host->history(0));
    CHECK(max_difference(engine->logits(Rows::kLast), host->logits(Rows::kLast)) < kFloatTolerance);
    // Another turn goes on from there.
    const auto turn = at::tensor({5, 6, 7}, at::kLong).unsqueeze(0);
    host->append(turn);
    engine->append(turn);
    CHECK(max_difference(engine->logits(Rows::kLast), host->logits(Rows::kLast)) < kFloatTolerance);
    CHECK(decoded(*engine, 9, sampling).rows == decoded(*host, 9, sampling).rows);
  }
}

TEST_CASE("an exception of the caller's leaves what was appended before it", "[graph]") {
  const auto model = small_models().wide;
  const auto prompt = (at::arange(9) * 31 % 1000).view({1, 9});
  const Sampling sampling{.temperature = 1, .top_k = 30, .seed = 11};
  const auto host = make_engine(model, {.kind = EngineKind::kEager, .capacity = 64});
  const auto engine = graph_engine(model, {.capacity = 64, .launch_steps = 8});
  for (Engine* one : {host.get(), static_cast<Engine*>(engine.get())}) {
    one->append(prompt);
    const auto throws = [&](int64_t, int64_t) -> bool {
      return one->position() == 12 ? throw Error("the caller's") : true;
    };
    CHECK_THROWS_WITH(one->decode(20, sampling, throws), "the caller's");
    CHECK(one->position() == 12);
    CHECK(one->history(0).size() == 12);
  }
  CHECK(max_difference(engine->logits(Rows::kLast), host->logits(Rows::kLast)) < kFloatTolerance);
  CHECK(decoded(*engine, 9, sampling).rows == decoded(*host, 9, sampling).rows);
}

TEST_CASE("a launch never passes the capacity, and what is too much is an error", "[graph]") {
  const auto model = small_models().wide;
  const auto engine = graph_engine(model, {.capacity = 20, .chunk = 16, .launch_steps = 8});
  engine->append((at::arange(9) * 31).view({1, 9}));
  CHECK(decoded(*engine, 12, {.temperature = 0}).rows[0].size() == 12);  // the last is not appended
  CHECK(engine->position() == 20);
  CHECK_THROWS_WITH(decoded(*engine, 2, {.temperature = 0}), Catch::Contains("at most 20 tokens"));
  engine->rewind(9);
  engine->append((at::arange(1) + 3).view({1, 1}));
  int64_t told = 0;
  const auto count = [&](int64_t, int64_t) { return ++told > 0; };
  CHECK_THROWS_WITH(engine->decode(30, {.temperature = 0}, count), Catch::Contains("at most 20"));
  CHECK(told == 11);  // what fits, and the one that is not appended
  CHECK_THROWS_WITH(graph_engine(model, {.chunk = 4, .launch_steps = 5}),
                    Catch::Contains("1 to 4, got 5"));
  CHECK_THROWS_WITH(make_engine(model, {.kind = EngineKind::kGraph}), Catch::Contains("[graph]"));
  CHECK_THROWS_WITH(make_engine(model, {.kind = EngineKind::kGraph, .cached = false}),
                    Catch::Contains("expected a cache"));
}

TEST_CASE("what was recorded serves every seed, and is recorded anew for another sampler",
          "[graph]") {
  const auto engine = graph_engine(small_models().wide, {.capacity = 200, .launch_steps = 4});
  engine->append((at::arange(9) * 31).view({1, 9}));
  const auto before = recordings;
  decoded(*engine, 5, {.temperature = 1, .top_k = 9, .seed = 1});
  decoded(*engine, 9, {.temperature = 1, .top_k = 9, .seed = 2});
  CHECK(recordings - before == 1);
  decoded(*engine, 3, {.temperature = 1, .top_k = 9, .seed = 2});  // steps of one
  CHECK(recordings - before == 2);
  decoded(*engine, 5, {.temperature = 1, .top_k = 10, .seed = 2});
  CHECK(recordings - before == 3);
}

TEST_CASE("the best are found in the host's order, equals and zeros of both signs too", "[graph]") {
  torch::manual_seed(1);
  auto logits = at::randn({3, 777}).to(at::kBFloat16).to(at::kFloat).contiguous();  // many equals
  logits.narrow(1, 100, 300).copy_(at::randn({3, 300}).sign() * 0.0);
  std::vector<Candidate> want;
  for (int64_t id = 0; id < 777; ++id) {
    want.push_back({id, logits[1][id].item<float>()});
  }
  std::sort(want.begin(), want.end(), is_better);
  for (const int64_t k : {1, 2, 50, 500, 776, 777}) {
    const auto [ids, values] = best_of(logits, k);
    REQUIRE(ids.sizes() == at::IntArrayRef({3, k}));
    for (int64_t i = 0; i < k; ++i) {
      REQUIRE(ids[1][i].item<int64_t>() == want[static_cast<size_t>(i)].id);
      REQUIRE(values[1][i].item<float>() == want[static_cast<size_t>(i)].logit);
    }
  }
}

TEST_CASE("where too many tokens are equal the host chooses, and the tokens stay the same",
          "[graph]") {
  const Sampling sampling{.temperature = 1.5, .top_k = 20, .repetition_penalty = 1.5, .seed = 9};
  DeviceSampler sampler(sampling, 1, 1003, at::kCPU);
  const auto half = at::full({1}, 0.5, at::kDouble);
  CHECK(sampler.choose(at::zeros({1, 1003}), half).item<int64_t>() == -1);
  const auto nan = at::full({1, 1003}, std::numeric_limits<float>::quiet_NaN());
  CHECK(sampler.choose(nan, half).item<int64_t>() < 1003);  // whatever it is, it is a token
  torch::manual_seed(3);
  Gemma3Model model(small_config(at::kFloat));    // its head is not the embedding
  for (const int64_t equals : {200, 400, 900}) {  // in some of the steps, in more, in all
    CAPTURE(equals);
    {
      const torch::NoGradGuard no_grad;
      auto& rows = model->out_head->weight;
      rows.narrow(0, 0, equals).copy_(rows[0].expand({equals, -1}));
    }
    const auto host = make_engine(model, {.kind = EngineKind::kEager, .capacity = 128});
    const auto engine = graph_engine(model, {.capacity = 128, .launch_steps = 8});
    const auto prompt = (at::arange(9) * 31 % 1000).view({1, 9});
    host->append(prompt);
    engine->append(prompt);
    CHECK(decoded(*engine, 100, sampling).rows == decoded(*host, 100, sampling).rows);
    CHECK(engine->history(0) == host->history(0));
  }
}

namespace {

std::atomic<int64_t> waits{0};

// Operations whose result the host reads, or whose shape it must know.
std::unique_ptr<at::ObserverContext> see_waits(const at::RecordFunction& function) {
  static const std::set<std::string> kWaiting{"aten::item",
                                              "aten::_local_scalar_dense",
                                              "aten::nonzero",
                                              "aten::masked_select",
                                              "aten::is_nonzero",
                                              "aten::equal",
                                              "aten::unique_dim"};
  waits += kWaiting.contains(function.name()) ? 1 : 0;
  return nullptr;
}

}  // namespace

TEST_CASE("no step of decoding asks the device for a number", "[graph][engine]") {
  const auto model = small_models().wide;
  const auto prompt = (at::arange(9) * 31).view({1, 9});
  const auto handle = at::addGlobalCallback(at::RecordFunctionCallback(see_waits));
  at::tensor({1}, at::kLong).item<int64_t>();
  const auto counted = waits.exchange(0);
  for (const auto& sampling : kSamplings) {
    const auto eager = make_engine(model, {.kind = EngineKind::kEager, .capacity = 64});
    const auto graph = graph_engine(model, {.capacity = 64, .launch_steps = 4});
    for (Engine* one : {eager.get(), static_cast<Engine*>(graph.get())}) {
      one->append(prompt);
      decoded(*one, 20, sampling);
    }
  }
  at::removeCallback(handle);
  CHECK(counted > 0);
  CHECK(waits == 0);
}

namespace {

std::atomic<int64_t> transfers{0};

// Tensors taken to a device by name, the host's or the model's: on a GPU each is a copy between the two.
std::unique_ptr<at::ObserverContext> see_transfers(const at::RecordFunction& function) {
  if (std::string(function.name()) == "aten::to") {
    for (const auto& input : function.inputs()) {
      transfers += input.isDevice() ? 1 : 0;
    }
  }
  return nullptr;
}

int64_t transfers_of(const Work& work) {
  const auto handle =
      at::addGlobalCallback(at::RecordFunctionCallback(see_transfers).needsInputs(true));
  transfers = 0;
  work();
  at::removeCallback(handle);
  return transfers;
}

}  // namespace

TEST_CASE("a token goes to the device once and is read once, and a launch's are copied together",
          "[graph][engine]") {
  const auto model = small_models().wide;
  for (const auto& sampling : {kSamplings[0], kSamplings[3]}) {
    const auto eager = make_engine(model, {.kind = EngineKind::kEager, .capacity = 64});
    const auto graph = graph_engine(model, {.capacity = 64, .launch_steps = 8});
    eager->append((at::arange(9) * 31).view({1, 9}));
    graph->append((at::arange(9) * 31).view({1, 9}));
    // 20 choices read, 19 tokens sent (which the host does not wait for).
    CHECK(transfers_of([&] { decoded(*eager, 20, sampling); }) == 39);
    decoded(*graph, 17, sampling);  // recorded
    // The first choice is the host's; of each launch the one copy is into host_chosen_.
    CHECK(transfers_of([&] { decoded(*graph, 17, sampling); }) == 1);
  }
}

TEST_CASE("Apple's GPUs see powers of two", "[engine]") {
  CHECK(pass_length(700, 512, /*few_shapes=*/true) == 512);
  CHECK(pass_length(188, 512, /*few_shapes=*/true) == 128);
  CHECK(pass_length(5, 512, /*few_shapes=*/true) == 4);
  CHECK(pass_length(1, 512, /*few_shapes=*/true) == 1);
  CHECK(pass_length(700, 512, /*few_shapes=*/false) == 512);
  CHECK(pass_length(188, 512, /*few_shapes=*/false) == 188);
}
