#include <ATen/Functions.h>
#include <fmt/format.h>

#include "gemma_torch/engine/fused.h"
#include "support/catch.h"
#include "support/real.h"

using namespace gemma_torch;
using namespace gemma_torch::test_real;

namespace {

EngineOptions fused(int64_t capacity) {
  return {.kind = EngineKind::kFused, .capacity = capacity};
}

EngineOptions with_full_head(int64_t capacity) {
  auto options = fused(capacity);
  options.fused.two_stage_head = false;
  return options;
}

// Everything in float32.
EngineOptions exact(int64_t capacity) {
  auto options = fused(capacity);
  options.kv_dtype = at::kFloat;
  options.fused.products = at::kFloat;
  return options;
}

// Texts in many languages, code and numbers: the tokenizer's goldens, one after the other from a different one each.
std::vector<std::vector<int64_t>> some_texts(size_t count, size_t length) {
  const auto goldens = golden_json("tokenizer_goldens.json")["encode"];
  std::vector<std::vector<int64_t>> texts;
  for (size_t n = 0; n < count; ++n) {
    std::vector<int64_t> ids = {2};
    for (size_t i = n * goldens.size() / count; ids.size() < length; i = (i + 1) % goldens.size()) {
      for (const auto& id : goldens[i][2]) {  // [group, text, ids]
        if (id.get<int64_t>() < 262'144) {    // the image token has no embedding
          ids.push_back(id.get<int64_t>());
        }
      }
    }
    ids.resize(length);
    texts.push_back(ids);
  }
  return texts;
}

// top(1) and top(64) against the full head at every position of the texts.
void check_heads(size_t texts, size_t length) {
  const auto* loaded = real(c10::kBFloat16);
  if (loaded == nullptr) return;
  FusedEngine engine(loaded->model, fused(static_cast<int64_t>(length)));
  FusedEngine full(loaded->model, with_full_head(static_cast<int64_t>(length)));
  int64_t positions = 0, most = 0;
  double greedy_rows = 0, top_rows = 0;
  for (const auto& text : some_texts(texts, length)) {
    engine.reset();
    full.reset();
    for (const auto id : text) {
      engine.append({id});
      full.append({id});
      const auto first = engine.top(1);
      greedy_rows += static_cast<double>(engine.survivors());
      const auto best = engine.top(64);
      top_rows += static_cast<double>(engine.survivors());
      most = std::max(most, engine.survivors());
      const auto want = full.top(64);
      REQUIRE(at::equal(best.ids, want.ids));
      REQUIRE(at::equal(best.logits, want.logits));
      REQUIRE(first.ids.item<int64_t>() == want.ids[0][0].item<int64_t>());
      ++positions;
    }
  }
  std::cout << fmt::format(
      "{} positions of {} texts: top 1 and top 64 equal the full head's at all of them; rows "
      "scored exactly, mean: {:.0f} "
      "and {:.0f}, most: {}\n",
      positions,
      texts,
      greedy_rows / static_cast<double>(positions),
      top_rows / static_cast<double>(positions),
      most);
}

}  // namespace

TEST_CASE("exact, in float32 throughout, equals transformers float32", "[real]") {
  const auto* loaded = real(c10::kBFloat16);
  if (loaded == nullptr) return;
  const auto golden = golden_json("real_270m.json");
  FusedEngine engine(loaded->model, exact(2048));
  for (const auto& prompt : golden["prompts"]) {
    const std::vector<int64_t> ids = prompt["ids"];
    CAPTURE(prompt["name"].get<std::string>(), ids.size());
    engine.reset();
    engine.append(ids);
    const auto logits = engine.logits(Rows::kAll)[0];
    const double worst = compare_kept(prompt, golden["fixed_ids"], logits);
    CHECK(worst <= kLogitTolerance);
    const auto best = logits.argmax(-1);
    int64_t otherwise = 0;
    for (size_t t = 0; t < ids.size(); ++t) {
      const bool equal =
          best[static_cast<int64_t>(t)].item<int64_t>() == prompt["argmax"][t].get<int64_t>();
      otherwise += equal ? 0 : 1;
      if (prompt["gap"][t].get<double>() > 2 * kLogitTolerance) {
        CHECK(equal);
      }
    }
    for (const size_t piece : {size_t{1}, size_t{7}, size_t{512}}) {
      if (piece > 1 || ids.size() < 100) {
        engine.reset();
        append_in_pieces(engine, ids, piece);
        CAPTURE(piece);
        CHECK(greedy(engine, 48) == prompt["greedy"].get<std::vector<int64_t>>());
      }
    }
    std::cout << fmt::format(
        "{}: {} tokens, largest logit difference {:.2e}, near ties decided otherwise: {}\n",
        prompt["name"].get<std::string>(),
        ids.size(),
        worst,
        otherwise);
  }
}

TEST_CASE("the two-stage head is the full head on real text", "[real]") {
  check_heads(8, 40);
}

// Some minutes: `test_real_fused "[long]"`.
TEST_CASE("the two-stage head is the full head on 20 texts of 512 tokens", "[.][long]") {
  check_heads(20, 512);
}

TEST_CASE("sampled text is the same with the two-stage head and without", "[real]") {
  const auto* loaded = real(c10::kBFloat16);
  if (loaded == nullptr) return;
  FusedEngine two_stage(loaded->model, fused(256)), full(loaded->model, with_full_head(256));
  const std::vector<Sampling> ways = {
      {.temperature = 0},
      {.temperature = 0, .repetition_penalty = 1.3},
      {.temperature = 1, .top_k = 64},
      {.temperature = 0.8, .top_k = 40, .top_p = 0.9, .repetition_penalty = 1.2},
      {.temperature = 1.4, .top_k = 300, .min_p = 0.02}};
  const auto text = [](Engine& engine, const Sampling& sampling, int64_t prompt) {
    std::vector<int64_t> ids;
    engine.reset();
    engine.append(some_texts(3, 30)[static_cast<size_t>(prompt)]);
    engine.decode(48, sampling, [&](int64_t /*row*/, int64_t id) {
      ids.push_back(id);
      return true;
    });
    return ids;
  };
  for (auto sampling : ways) {
    for (int64_t prompt = 0; prompt < 3; ++prompt) {
      sampling.seed = static_cast<uint64_t>(100 + prompt);
      CAPTURE(sampling.temperature, sampling.top_k, sampling.repetition_penalty, prompt);
      CHECK(text(two_stage, sampling, prompt) == text(full, sampling, prompt));
      CHECK(two_stage.survivors() > 0);  // else this compared the full head with itself
    }
  }
}

TEST_CASE("exact with its defaults, and int8, are near float32", "[real]") {
  const auto* wide = real(c10::kFloat);
  const auto* rounded = real(c10::kBFloat16);
  if (wide == nullptr) return;
  const auto golden = golden_json("real_270m.json");
  const std::vector<int64_t> text = golden["perplexity"]["ids"];
  const auto count = golden["bfloat16"]["tokens"].get<int64_t>();
  const auto judge = make_engine(wide->model, {.kind = EngineKind::kEager, .capacity = count});
  auto int8 = fused(count);
  int8.fused.quant = OnTheFly::kInt8;
  struct Way {
    const char* name;
    EngineOptions options;
    double limit;
  };
  // transformers' own bfloat16, the nearer of its two ways.
  const double own = golden["bfloat16"]["sdpa"]["mean_kl"].get<double>();
  for (const auto& way : {Way{"exact", fused(count), own}, Way{"int8", int8, 0.0020}}) {
    const auto engine = make_engine(rounded->model, way.options);
    judge->reset();
    double sum = 0;
    int64_t equal = 0;
    for (int64_t start = 0; start < count; start += 250) {
      const std::vector<int64_t> piece(text.begin() + start, text.begin() + start + 250);
      judge->append(piece);
      engine->append(piece);
      const auto p = judge->logits(Rows::kAll)[0], q = engine->logits(Rows::kAll)[0];
      const auto log_p = p.log_softmax(-1);
      sum += (log_p.exp() * (log_p - q.log_softmax(-1))).sum().item<double>();
      equal += p.argmax(-1).eq(q.argmax(-1)).sum().item<int64_t>();
    }
    const double kl = sum / static_cast<double>(count);
    std::cout << fmt::format(
        "{}: mean KL to float32 {:.5f} over {} tokens (at most {:.5f}), argmax equal at {}\n",
        way.name,
        kl,
        count,
        way.limit,
        equal);
    CHECK(kl <= way.limit);
  }
}

TEST_CASE("greedy text of every instruction set on the real weights", "[real]") {
  const auto* loaded = real(c10::kBFloat16);
  if (loaded == nullptr) return;
  const std::vector<int64_t> ids = golden_json("real_270m.json")["prompts"][0]["ids"];
  std::vector<int64_t> want;
  for (const auto isa : kernels::usable_isas()) {
    auto options = exact(128);
    options.fused.isa = isa;
    const auto engine = make_engine(loaded->model, options);
    engine->append(ids);
    const auto got = greedy(*engine, 24);
    want = want.empty() ? got : want;
    CAPTURE(kernels::isa_name(isa));
    CHECK(got == want);
  }
}
