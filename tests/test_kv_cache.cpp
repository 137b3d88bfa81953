#include "gemma_torch/model/kv_cache.h"

#include <ATen/Functions.h>

#include "gemma_torch/base/error.h"
#include "gemma_torch/engine/engine.h"
#include "support/catch.h"
#include "support/golden.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

// Logits of every token (B, T, V), fed in pieces of `chunk`.
at::Tensor in_chunks(Engine& engine, const at::Tensor& ids, int64_t chunk) {
  std::vector<at::Tensor> parts;
  for (int64_t start = 0; start < ids.size(1); start += chunk) {
    engine.append(ids.narrow(1, start, std::min(chunk, ids.size(1) - start)).contiguous());
    parts.push_back(engine.logits(Rows::kAll));
  }
  return at::cat(parts, 1);
}

std::unique_ptr<Engine> engine_of(const Tiny& tiny, EngineOptions options = {}) {
  options.batch = 2;
  return make_engine(tiny.model(), options);
}

}  // namespace

TEST_CASE("logits with the cache equal those without, for every chunk", "[kv_cache][golden]") {
  for (const char* name : {"tiny_grouped.safetensors", "tiny_scaled.safetensors"}) {
    const Tiny tiny(name);
    for (const int64_t most : {5, 8, 64}) {  // the ring wraps at 12, 15, never
      for (const int64_t chunk : {1, 2, 7, 8, 9, 21}) {
        CAPTURE(name, most, chunk);
        const auto engine = engine_of(tiny, {.capacity = 40, .chunk = most});
        CHECK(max_difference(in_chunks(*engine, tiny.want.at("ids"), chunk),
                             tiny.want.at("logits")) < kFloatTolerance);
      }
    }
  }
}

TEST_CASE("greedy tokens go on as transformers' do, far past the ring", "[kv_cache][golden]") {
  for (const char* name : {"tiny_grouped.safetensors", "tiny_scaled.safetensors"}) {
    const Tiny tiny(name);
    const auto engine = engine_of(tiny, {.capacity = 64, .chunk = 4});
    engine->append(tiny.want.at("ids"));
    std::vector<std::vector<int64_t>> rows(2);
    engine->decode(24, {.temperature = 0}, [&](int64_t row, int64_t id) {
      rows[static_cast<size_t>(row)].push_back(id);
      return true;
    });
    for (int64_t row = 0; row < 2; ++row) {
      const auto want = tiny.want.at("greedy")[row].contiguous();
      CHECK(
          rows[static_cast<size_t>(row)] ==
          std::vector<int64_t>(want.data_ptr<int64_t>(), want.data_ptr<int64_t>() + want.numel()));
    }
  }
}

TEST_CASE("left-padded rows see only their own tokens", "[kv_cache][golden]") {
  const Tiny tiny("tiny_grouped.safetensors");
  const auto first = tiny.want.at("padded.first");
  for (const int64_t chunk : {1, 6, 21}) {
    const auto engine = engine_of(tiny, {.capacity = 40, .chunk = 6});
    engine->reset(first);
    const auto logits = in_chunks(*engine, tiny.want.at("padded.ids"), chunk);
    CHECK(at::isfinite(logits).all().item<bool>());
    for (int64_t row = 0; row < 2; ++row) {
      const auto start = first[row].item<int64_t>();
      const auto length = logits.size(1) - start;
      CHECK(max_difference(logits[row].narrow(0, start, length),
                           tiny.want.at("padded.logits")[row].narrow(0, start, length)) <
            kFloatTolerance);
    }
  }
}

TEST_CASE("rewind at the ring's slack equals a fresh run, and one past it throws", "[kv_cache]") {
  const Tiny tiny("tiny_grouped.safetensors");
  const auto ids = tiny.want.at("ids");
  const int64_t chunk = 6;  // slack: ring 13 - window 8 = 5
  const auto engine = engine_of(tiny, {.capacity = 40, .chunk = chunk});
  engine->append(ids);
  CHECK_THROWS_WITH(engine->rewind(ids.size(1) - chunk),
                    Catch::Contains("reset and prefill again"));
  const auto position = ids.size(1) - (chunk - 1);
  engine->rewind(position);
  CHECK(engine->position() == position);
  CHECK(engine->history(0).size() == static_cast<size_t>(position));
  const auto rest = ids.narrow(1, position, chunk - 1).contiguous();
  CHECK(max_difference(in_chunks(*engine, rest, 2),
                       tiny.want.at("logits").narrow(1, position, chunk - 1)) < kFloatTolerance);
  CHECK_THROWS_AS(engine->rewind(engine->position() + 1), Error);
  engine->rewind(0);
  CHECK(max_difference(in_chunks(*engine, ids, 3), tiny.want.at("logits")) < kFloatTolerance);
}

TEST_CASE("a copied prefix goes on by itself", "[kv_cache]") {
  const Tiny tiny("tiny_scaled.safetensors");
  const auto ids = tiny.want.at("ids");
  const auto source = engine_of(tiny, {.capacity = 32, .chunk = 6});
  const auto copy = engine_of(tiny, {.capacity = 40, .chunk = 6});
  source->append(ids.narrow(1, 0, 17).contiguous());
  copy->copy_from(*source);
  source->append(ids.narrow(1, 0, 4).contiguous());  // must not disturb the copy
  copy->append(ids.narrow(1, 17, 4).contiguous());
  CHECK(max_difference(copy->logits(Rows::kAll), tiny.want.at("logits").narrow(1, 17, 4)) <
        kFloatTolerance);
  CHECK(copy->history(1).size() == 21);
  const auto small = engine_of(tiny, {.capacity = 8, .chunk = 6});
  CHECK_THROWS_AS(small->copy_from(*source), Error);
}

TEST_CASE("a bfloat16 cache serves float32 weights within its rounding", "[kv_cache]") {
  const Tiny tiny("tiny_grouped.safetensors");
  const auto engine = engine_of(tiny, {.capacity = 40, .kv_dtype = at::kBFloat16});
  const auto difference =
      max_difference(in_chunks(*engine, tiny.want.at("ids"), 3), tiny.want.at("logits"));
  CHECK(difference > 1e-5);
  CHECK(difference < 0.3);
}

TEST_CASE("a full cache is an error that says so", "[kv_cache]") {
  const Tiny tiny("tiny_grouped.safetensors");
  const auto engine = engine_of(tiny, {.capacity = 22, .chunk = 6});
  engine->append(tiny.want.at("ids"));
  CHECK_THROWS_WITH(engine->append(at::zeros({2, 2}, at::kLong)),
                    Catch::Contains("expected at most 22 tokens"));
  CHECK(engine->position() == 21);
  KvCache cache(tiny.config, {.capacity = 4, .chunk = 2});
  CHECK_THROWS_AS(cache.place(3), Error);
}
