// What only a CUDA device can show: the numbers there, captured graphs, how often the host waits, what is allocated.
// Built with a CUDA LibTorch, compiled against CUDA's headers elsewhere; skips where there is no device.

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/util/Exception.h>
#include <torch/cuda.h>

#include <iostream>

#include "gemma_torch/base/device.h"
#include "gemma_torch/engine/graph.h"
#include "gemma_torch/inspect/parity.h"
#include "support/catch.h"
#include "support/decoding.h"
#include "support/golden.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

const c10::Device kCuda("cuda:0");

bool has_device() {
  if (!torch::cuda::is_available()) {
    std::cout << "skipped: no CUDA device. On a machine with one: bash tests/gpu/run_all.sh\n";
    return false;
  }
  return true;
}

at::Tensor some_ids(int64_t rows, int64_t count) {
  return (at::arange(rows * count) * 37 + 5).remainder(1000).view({rows, count});
}

Gemma3Model on_cuda(Gemma3Model model) {
  model->to(kCuda);
  return model;
}

std::unique_ptr<Engine> engine_of(EngineKind kind,
                                  const Gemma3Model& model,
                                  int64_t batch,
                                  int64_t steps = 8) {
  return make_engine(model, {.kind = kind, .capacity = 128, .batch = batch, .launch_steps = steps});
}

// Counts the calls that made the host wait for the device, as PyTorch warns of them.
class Waits : public c10::WarningHandler {
 public:
  Waits() : guard_(this) {
    c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_WARN);
  }
  ~Waits() override {
    c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_DISABLED);
  }
  void process(const c10::Warning& warning) override {
    count += warning.msg().find("synchronizing") != std::string::npos ? 1 : 0;
  }

  int64_t count = 0;

 private:
  c10::WarningUtils::WarningHandlerGuard guard_;
};

int64_t allocations() {
  const auto stats = c10::getDeviceAllocator(c10::kCUDA)->getDeviceStats(0);
  constexpr auto kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  return stats.allocation[kAll].allocated;
}

}  // namespace

TEST_CASE("CUDA's float32 numbers are the CPU's, prefill, pieces and decode", "[cuda]") {
  if (!has_device()) {
    return;
  }
  const auto ids = some_ids(2, 60);
  const auto padding = at::tensor({0, 4}, at::kLong);
  std::vector<at::Tensor> all;
  for (const auto kind : {EngineKind::kEager, EngineKind::kTraced, EngineKind::kGraph}) {
    const auto cuda = engine_of(kind, on_cuda(small_models().wide), 2);
    const auto cpu = engine_of(EngineKind::kEager, small_models().wide, 2);
    for (Engine* engine : {cuda.get(), cpu.get()}) {
      engine->reset(padding);
      for (const auto& [start, length] : {std::pair{0, 33}, {33, 1}, {34, 26}}) {
        engine->append(ids.narrow(1, start, length));
      }
      engine->rewind(55);
      engine->append(ids.narrow(1, 0, 5));
    }
    const auto difference =
        max_difference(cuda->logits(Rows::kAll).to(at::kCPU), cpu->logits(Rows::kAll));
    CHECK(difference < 1e-3);
    CHECK(at::equal(cuda->top(50).ids.narrow(1, 0, 1), cpu->top(50).ids.narrow(1, 0, 1)));
    CHECK(max_difference(cuda->log_prob(ids.narrow(1, 0, 5)), cpu->log_prob(ids.narrow(1, 0, 5))) <
          1e-3);
  }
}

TEST_CASE("captured graphs make the eager engine's tokens", "[cuda][graph]") {
  if (!has_device()) {
    return;
  }
  const auto model = on_cuda(small_models().wide);
  const auto prompt = some_ids(2, 11);
  for (const auto& sampling : kSamplings) {
    CAPTURE(sampling.seed);
    const auto eager = engine_of(EngineKind::kEager, model, 2);
    eager->append(prompt);
    const auto want = decoded(*eager, 60, sampling);
    for (const int64_t steps : {1, 8}) {
      const auto graph = engine_of(EngineKind::kGraph, model, 2, steps);
      graph->append(prompt);
      CHECK(decoded(*graph, 60, sampling).rows == want.rows);
      CHECK(graph->history(1) == eager->history(1));
      CHECK(max_difference(graph->logits(Rows::kLast).to(at::kCPU),
                           eager->logits(Rows::kLast).to(at::kCPU)) < 1e-3);
      // Again, from replays alone, and after an end within a launch.
      graph->reset();
      graph->append(prompt);
      decoded(*graph, 60, sampling, {3, 5});
      graph->reset();
      graph->append(prompt);
      CHECK(decoded(*graph, 60, sampling).rows == want.rows);
    }
  }
}

TEST_CASE("bfloat16 graphs choose what the float32 modules hold for best", "[cuda][graph]") {
  if (!has_device()) {
    return;
  }
  const auto engine = engine_of(EngineKind::kGraph, on_cuda(small_models().rounded), 1);
  const auto site = compare_decode(*engine, small_models().wide, some_ids(1, 20), 64);
  CAPTURE(site.max_abs, site.tolerance);
  CHECK(site.ok());
}

TEST_CASE("the host waits once a token, and once a launch", "[cuda]") {
  if (!has_device()) {
    return;
  }
  const auto model = on_cuda(small_models().wide);
  for (const auto& sampling : kSamplings) {
    CAPTURE(sampling.seed);
    const auto eager = engine_of(EngineKind::kEager, model, 1);
    eager->append(some_ids(1, 9));
    decoded(*eager, 4, sampling);
    {
      Waits waits;
      decoded(*eager, 20, sampling);
      CHECK(waits.count <= 20);
      CHECK(waits.count > 0);
    }
    const auto graph = engine_of(EngineKind::kGraph, model, 1, /*steps=*/8);
    graph->append(some_ids(1, 9));
    decoded(*graph, 17, sampling);
    graph->top(1);
    {
      Waits waits;
      const auto before = allocations();
      decoded(*graph, 17, {sampling});  // the first on the host, then two launches
      CHECK(waits.count <= 3 + (sampling.repetition_penalty != 1 ? 1 : 0));
      CHECK(waits.count > 0);
      if (sampling.temperature == 0 && sampling.repetition_penalty == 1) {
        const auto first = allocations() - before;
        const auto again = allocations();
        decoded(*graph, 33, {sampling});
        CHECK(allocations() - again == first);  // two launches more took nothing more
      }
    }
  }
}

TEST_CASE("recording leaves the user's random numbers alone", "[cuda][graph]") {
  if (!has_device()) {
    return;
  }
  auto generator = at::globalContext().defaultGenerator(kCuda);
  const auto before = generator.get_state().clone();
  const auto graph = engine_of(EngineKind::kGraph, on_cuda(small_models().wide), 1);
  graph->append(some_ids(1, 9));
  decoded(*graph, 17, {.temperature = 1, .top_k = 40, .seed = 3});
  CHECK(at::equal(generator.get_state(), before));
}

TEST_CASE("the device's memory is counted", "[cuda]") {
  if (!has_device()) {
    return;
  }
  reset_peak_device_memory(kCuda);
  const auto model = on_cuda(small_models().wide);
  CHECK(*peak_device_memory_bytes(kCuda) >= static_cast<int64_t>(model->tok_emb->weight.nbytes()));
  CHECK(graph_refusal(kCuda).empty());
  CHECK(graph_refusal(at::kCPU).find("CUDA device") != std::string::npos);
}
