// The traced engine: the modules' own numbers, for any number of tokens, in this process and from a file.

#include "gemma_torch/engine/traced.h"

#include <ATen/Functions.h>
#include <torch/script.h>

#include <filesystem>

#include "gemma_torch/base/error.h"
#include "support/catch.h"
#include "support/golden.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

namespace fs = std::filesystem;

// Ids (B, T) that repeat nothing for a while.
at::Tensor some_ids(int64_t rows, int64_t count, int64_t vocab_size) {
  return (at::arange(rows * count) * 7 + 3).remainder(vocab_size).view({rows, count});
}

// The modules as they stand, over a cache like the trace's: what was traced, untraced.
class Modules {
 public:
  Modules(Gemma3Model model, const EngineOptions& options)
      : model_(std::move(model)),
        cache_(model_->cfg, cache_options(options, model_->tok_emb->weight, /*fixed=*/true)) {}

  at::Tensor append(const at::Tensor& ids) {
    const torch::NoGradGuard no_grad;
    const auto start = cache_.position();
    const auto placed = cache_.place(at::arange(start, start + ids.size(1)));
    const auto x = model_->hidden(ids, placed, &cache_);
    cache_.advance(ids.size(1));
    return model_->out_head(x).to(at::kFloat);
  }

  KvCache& cache() { return cache_; }

 private:
  Gemma3Model model_;
  KvCache cache_;
};

struct Folder {
  Folder()
      : path(fs::temp_directory_path() / fs::path("gemma_traced_" + std::to_string(::getpid()))) {
    fs::create_directories(path);
  }
  ~Folder() { fs::remove_all(path); }
  std::string file(const char* name) const { return (path / name).string(); }
  fs::path path;
};

EngineOptions traced(int64_t batch = 1, const std::string& file = {}) {
  return {.kind = EngineKind::kTraced,
          .capacity = 60,
          .batch = batch,
          .chunk = 24,
          .traced_file = file};
}

}  // namespace

TEST_CASE("a trace gives the modules' numbers bit for bit, for any number of tokens", "[traced]") {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const Tiny tiny("tiny_grouped.safetensors");
    const auto engine = make_engine(tiny.model(dtype), traced(2));
    Modules modules(tiny.model(dtype), traced(2));
    const auto first = at::tensor({0, 3}, at::kLong);
    for (const auto& padding : {at::Tensor(), first}) {
      engine->reset(padding);
      modules.cache().reset(padding);
      const auto ids = some_ids(2, 60, tiny.config.vocab_size);
      int64_t start = 0;
      for (const int64_t count :
           {1, 5, 1, 1, 24, 2, 17, 1}) {  // past the window of 6, and round the ring
        const auto part = ids.narrow(1, start, count);
        engine->append(part);
        CHECK(at::equal(engine->logits(Rows::kAll), modules.append(part)));
        start += count;
      }
      engine->rewind(45);
      modules.cache().rewind(45);
      engine->append(ids.narrow(1, 0, 3));
      CHECK(at::equal(engine->logits(Rows::kAll), modules.append(ids.narrow(1, 0, 3))));
    }
  }
}

TEST_CASE("a traced engine does what an eager one does", "[traced]") {
  const Tiny tiny("tiny_scaled.safetensors");
  const auto ids = some_ids(1, 30, tiny.config.vocab_size);
  const auto run = [&](EngineKind kind) {
    auto how = traced();
    how.kind = kind;
    auto engine = make_engine(tiny.model(), how);
    engine->append(ids);  // more than a chunk
    std::vector<int64_t> made;
    engine->decode(20, {.temperature = 0}, [&](int64_t, int64_t id) {
      made.push_back(id);
      return true;
    });
    const auto copy = make_engine(tiny.model(), how);
    copy->copy_from(*engine);
    CHECK(copy->position() == engine->position());
    return std::pair(made, copy->log_prob(at::full({1, 1}, 5)));
  };
  const auto eager = run(EngineKind::kEager), traced = run(EngineKind::kTraced);
  CHECK(eager.first == traced.first);
  // Eager's products of one row, norms and angles are kernels of ours, which sum in another order.
  CHECK(max_difference(eager.second, traced.second) < 1e-5);
}

TEST_CASE("a trace runs from its file, frozen or not, in several engines at once", "[traced]") {
  const Tiny tiny("tiny_grouped.safetensors");
  const Folder folder;
  const auto path = folder.file("model.ts");
  for (const bool freeze : {false, true}) {
    save_trace(tiny.model(), traced(), freeze, "{\"model_type\": \"gemma3_text\"}", path);
    torch::jit::ExtraFilesMap extra{{"config.json", ""}};
    const auto script = torch::jit::load(path, at::kCPU, extra);
    CHECK(extra["config.json"] == "{\"model_type\": \"gemma3_text\"}");
    CHECK(script.attr("capacity").toInt() == 60);

    auto other_weights = tiny.model();
    other_weights->final_norm->scale.set_data(at::zeros_like(other_weights->final_norm->scale));
    const auto a = make_engine(other_weights, traced(1, path));  // the file's weights count
    const auto b = make_engine(tiny.model(), traced(1, path));
    Modules modules(tiny.model(), traced());
    const auto ids = some_ids(1, 40, tiny.config.vocab_size);
    a->append(ids.narrow(1, 0, 11));
    b->append(ids.narrow(1, 0, 2));
    a->append(ids.narrow(1, 11, 20));
    modules.append(ids.narrow(1, 0, 11));
    CHECK(at::equal(a->logits(Rows::kAll), modules.append(ids.narrow(1, 11, 20))));
    CHECK(b->position() == 2);
    const auto c = make_engine(tiny.model(), traced(1, path));
    c->copy_from(*a);  // into the script's buffers, that is
    c->append(ids.narrow(1, 0, 5));
    CHECK(at::equal(c->logits(Rows::kAll), modules.append(ids.narrow(1, 0, 5))));
    CHECK(a->report(0).engine == "traced");
    CHECK(a->report(0).bytes_per_token ==
          make_engine(tiny.model(), traced())->report(0).bytes_per_token);
  }
}

TEST_CASE("a trace recomputes everything where no cache is wanted", "[traced]") {
  const Tiny tiny("tiny_scaled.safetensors");
  const Folder folder;
  const auto path = folder.file("model.ts");
  auto model = tiny.model();
  save_trace(model, traced(), /*freeze=*/true, "{}", path);
  auto script = torch::jit::load(path);
  const torch::NoGradGuard no_grad;
  for (const int64_t count : {1, 2, 33, 100}) {  // past chunk and capacity: there is no cache
    const auto ids = some_ids(1, count, tiny.config.vocab_size);
    const auto got = script.get_method("forward_uncached")({ids, at::arange(count)}).toTensor();
    CHECK(at::equal(got, model->out_head(model->hidden(ids).slice(1, -1)).to(at::kFloat)));
  }
}

TEST_CASE("a trace of something else is refused", "[traced]") {
  const Tiny tiny("tiny_grouped.safetensors"), other("tiny_scaled.safetensors");
  const Folder folder;
  const auto path = folder.file("model.ts");
  save_trace(tiny.model(), traced(), /*freeze=*/false, "{}", path);
  const auto make = [&](const Tiny& what, EngineOptions how) {
    return make_engine(what.model(), how);
  };
  CHECK_THROWS_WITH(make(tiny, traced(2, path)),
                    Catch::Contains("expected a trace of 2 rows, got 1"));
  auto longer = traced(1, path);
  longer.capacity = 61;
  CHECK_THROWS_WITH(make(tiny, longer), Catch::Contains("at least 61 tokens, got 60"));
  auto narrow = traced(1, path);
  narrow.kv_dtype = at::kBFloat16;
  CHECK_THROWS_WITH(make(tiny, narrow),
                    Catch::Contains("keys and values in bfloat16, got float32"));
  CHECK_THROWS_WITH(make(other, traced(1, path)), Catch::Contains("for this model"));
  CHECK_THROWS_WITH(make(tiny, traced(1, folder.file("none.ts"))), Catch::Contains("none.ts"));
  write_file(folder.file("text.ts"), "not a zip file");
  CHECK_THROWS_WITH(make(tiny, traced(1, folder.file("text.ts"))),
                    Catch::Contains("expected a TorchScript file"));
  torch::jit::Module plain("Plain");
  plain.save(folder.file("plain.ts"));
  CHECK_THROWS_WITH(make(tiny, traced(1, folder.file("plain.ts"))),
                    Catch::Contains("expected a file of gemma trace"));
  auto fused = traced(1, path);
  fused.kind = EngineKind::kEager;
  CHECK_THROWS_WITH(make(tiny, fused), Catch::Contains("expected --engine traced"));
  CHECK_THROWS_WITH(save_trace(tiny.model(), traced(), false, "{}", folder.file("no/where.ts")),
                    Catch::Contains("where.ts"));
}
