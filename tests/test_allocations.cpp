// What a decoded token allocates. In the fused engine nothing: every operator new of this program and of the libraries it
// uses counts, and every allocation of ATen for the CPU. In the others tensors, but none that grows with the cache.
#include <ATen/Functions.h>
#include <ATen/record_function.h>
#include <c10/core/CPUAllocator.h>
#include <torch/utils.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "gemma_torch/engine/fused.h"
#include "support/catch.h"
#include "support/small_models.h"

namespace {

std::atomic<int64_t> allocations{0};
std::atomic<int64_t> tensor_bytes{0};  // that ATen was given

void* counted(size_t bytes, size_t alignment) {
  ++allocations;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  if (void* p = std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded)) {
    return p;
  }
  throw std::bad_alloc();
}

class CountingAllocator : public c10::Allocator {
 public:
  explicit CountingAllocator(c10::Allocator& real) : real_(real) {}
  c10::DataPtr allocate(size_t bytes) override {
    ++allocations;
    tensor_bytes += static_cast<int64_t>(bytes);
    return real_.allocate(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return real_.raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    real_.copy_data(to, from, bytes);
  }

 private:
  c10::Allocator& real_;
};

}  // namespace

void* operator new(size_t bytes) {
  return counted(bytes, alignof(std::max_align_t));
}
void* operator new(size_t bytes, std::align_val_t alignment) {
  return counted(bytes, static_cast<size_t>(alignment));
}
void operator delete(void* p) noexcept {
  std::free(p);
}
void operator delete(void* p, size_t) noexcept {
  std::free(p);
}
void operator delete(void* p, std::align_val_t) noexcept {
  std::free(p);
}
void operator delete(void* p, size_t, std::align_val_t) noexcept {
  std::free(p);
}

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

void count_tensors() {
  static CountingAllocator allocator(*c10::GetCPUAllocator());
  c10::SetCPUAllocator(&allocator, /*priority=*/1);
}

// The most numbers that one of the tensors had which any cat has put together.
std::atomic<int64_t> largest_cat{0};

std::unique_ptr<at::ObserverContext> see_cat(const at::RecordFunction& function) {
  if (std::string(function.name()) == "aten::cat") {
    for (const auto& tensor : function.inputs()[0].toTensorVector()) {
      largest_cat = std::max(largest_cat.load(), tensor.numel());
    }
  }
  return nullptr;
}

}  // namespace

TEST_CASE("a decoded token allocates nothing", "[fused][allocations]") {
  count_tensors();
  const auto before = allocations.load();
  (void)at::zeros({4});
  REQUIRE(allocations > before);  // else it counts nothing
  const auto models = small_models();
  {
    // Surer of its tokens than others, so that no step falls back to the full head, which makes a tensor of logits.
    const torch::NoGradGuard no_grad;
    models.rounded->tok_emb->weight.mul_(20);
  }
  for (const int64_t batch : {1, 3}) {
    for (const auto quant : {OnTheFly::kNone, OnTheFly::kInt8}) {
      EngineOptions options{.kind = EngineKind::kFused, .capacity = 200, .batch = batch};
      options.fused.quant = quant;
      options.fused.threads = 2;
      FusedEngine engine(models.rounded, options);
      engine.append(at::randint(0, 1003, {batch, 20}, at::kLong));
      for (const auto& sampling :
           {Sampling{.temperature = 0},
            Sampling{.temperature = 1, .top_k = 20, .top_p = 0.9, .min_p = 0.01},
            Sampling{.temperature = 0.7, .top_k = 40, .repetition_penalty = 1.1}}) {
        constexpr int64_t kWarm = 8, kTokens = 40;
        int64_t tokens = 0, at_start = 0, full_heads = 0;
        engine.decode(kTokens, sampling, [&](int64_t row, int64_t /*id*/) {
          tokens += row == 0 ? 1 : 0;
          at_start = tokens == kWarm ? allocations.load() : at_start;
          full_heads += engine.survivors() == 0 ? 1 : 0;
          return true;
        });
        const auto made = allocations - at_start;
        CAPTURE(batch, quant, sampling.temperature, sampling.top_k);
        REQUIRE(tokens == kTokens);
        // With a penalty the candidates grow with the text.
        CHECK(made <= (sampling.repetition_penalty == 1 ? 0 : 12));
        CHECK(full_heads == 0);
      }
    }
  }
}

TEST_CASE("a decoded token copies no keys or values, wherever it stands", "[allocations]") {
  count_tensors();
  const auto models = small_models();
  const auto& cfg = models.wide->cfg;
  for (const auto kind : {EngineKind::kEager, EngineKind::kTraced}) {
    const auto engine =
        make_engine(models.wide, {.kind = kind, .capacity = 3000, .kv_dtype = at::kFloat});
    const auto bytes_at = [&](int64_t depth) {
      engine->append(at::randint(0, 1003, {1, depth - engine->position()}, at::kLong));
      engine->decode(2, {.temperature = 0}, [](int64_t, int64_t) { return true; });
      const auto before = tensor_bytes.load();
      engine->decode(2, {.temperature = 0}, [](int64_t, int64_t) { return true; });
      return tensor_bytes - before;
    };
    const auto early = bytes_at(100);
    largest_cat = 0;
    const auto handle = at::addThreadLocalCallback(
        at::RecordFunctionCallback(see_cat).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
    engine->decode(2, {.temperature = 0}, [](int64_t, int64_t) { return true; });
    at::removeCallback(handle);
    const auto late = bytes_at(2900);
    CAPTURE(engine->report(0).engine, early, late);
    CHECK(largest_cat > 0);                            // the halves of the angles
    CHECK(largest_cat <= cfg.n_heads * cfg.head_dim);  // of one token
    if (kind == EngineKind::kTraced) {
      CHECK(late == early);  // all slots are met from the first token on
    } else {
      // Scores, masks and weights are as long as what is seen; the keys of one layer alone would be this much more.
      const auto keys = 2800 * cfg.n_kv_groups * cfg.head_dim * static_cast<int64_t>(sizeof(float));
      CHECK(late - early < keys / 2);
    }
  }
}
