// The real weights, against what transformers computes with them (tests/reference/make_real_goldens.py).

#include <ATen/Functions.h>
#include <fmt/ranges.h>

#include <cmath>
#include <iostream>

#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/generate/generate.h"
#include "gemma_torch/inspect/perplexity.h"
#include "gemma_torch/pretrained.h"
#include "support/catch.h"
#include "support/golden.h"
#include "support/real.h"

using namespace gemma_torch;
using namespace gemma_torch::test;
using namespace gemma_torch::test_real;
using nlohmann::json;

TEST_CASE("float32 logits equal transformers' on every prompt", "[real]") {
  const auto* loaded = real(c10::kFloat);
  if (loaded == nullptr) return;
  const auto golden = golden_json("real_270m.json");
  for (const auto& prompt : golden["prompts"]) {
    const std::vector<int64_t> ids = prompt["ids"];
    CAPTURE(prompt["name"].get<std::string>(), ids.size());
    const auto engine = make_engine(loaded->model, {.capacity = 2048});
    engine->append(ids);
    const auto logits = engine->logits(Rows::kAll)[0];
    const double worst = compare_kept(prompt, golden["fixed_ids"], logits);
    CHECK(worst <= kLogitTolerance);
    const auto best = logits.argmax(-1);
    std::vector<size_t> near_ties;
    for (size_t t = 0; t < ids.size(); ++t) {
      const bool equal =
          best[static_cast<int64_t>(t)].item<int64_t>() == prompt["argmax"][t].get<int64_t>();
      if (prompt["gap"][t].get<double>() > 2 * kLogitTolerance) {
        CAPTURE(t);
        CHECK(equal);
      } else if (!equal) {
        near_ties.push_back(t);
      }
    }
    std::cout << fmt::format(
        "{}: {} tokens, largest logit difference {:.2e}, near ties decided otherwise: {}\n",
        prompt["name"].get<std::string>(),
        ids.size(),
        worst,
        near_ties);
  }
}

TEST_CASE("48 greedy tokens are transformers', with the cache and without, for every chunk",
          "[real]") {
  const auto* loaded = real(c10::kFloat);
  if (loaded == nullptr) return;
  struct Way {
    int64_t chunk;
    size_t piece;
  };
  const auto goldens = golden_json("real_270m.json")["prompts"];
  for (const auto& prompt : goldens) {
    const std::vector<int64_t> ids = prompt["ids"];
    const std::vector<int64_t> want = prompt["greedy"];
    for (const auto& [chunk, piece] :
         {Way{512, 1}, {512, 7}, {511, 4096}, {512, 4096}, {513, 4096}, {2048, 4096}}) {
      CAPTURE(prompt["name"].get<std::string>(), chunk, piece);
      const auto engine = make_engine(loaded->model, {.capacity = 2048, .chunk = chunk});
      append_in_pieces(*engine, ids, piece);
      CHECK(greedy(*engine, 48) == want);
    }
    // Without a cache: one pass over prompt and continuation chooses each token of the continuation itself.
    auto all = ids;
    all.insert(all.end(), want.begin(), want.end() - 1);
    const at::NoGradGuard no_grad;
    const auto hidden = Gemma3Model(loaded->model)->hidden(as_row(all));
    const auto chosen = Linear(loaded->model->out_head)
                            ->forward(hidden[0].narrow(0, static_cast<int64_t>(ids.size()) - 1, 48))
                            .argmax(-1);
    CAPTURE(prompt["name"].get<std::string>());
    CHECK(at::equal(chosen, at::tensor(want, at::kLong)));
  }
}

TEST_CASE("rewind at the ring's slack goes on as a fresh run does", "[real]") {
  const auto* loaded = real(c10::kFloat);
  if (loaded == nullptr) return;
  const std::vector<int64_t> ids = golden_json("real_270m.json")["prompts"].back()["ids"];
  const auto length = static_cast<int64_t>(ids.size());
  const auto engine = make_engine(loaded->model, {.capacity = 2048});  // ring 1023, slack 511
  engine->append(ids);
  const auto want = engine->logits(Rows::kLast);
  CHECK_THROWS_AS(engine->rewind(length - 512), Error);
  engine->rewind(length - 511);
  engine->append(std::vector<int64_t>(ids.end() - 511, ids.end()));
  CHECK(max_difference(engine->logits(Rows::kLast), want) <= kLogitTolerance);
}

TEST_CASE("a batch of four prompts gives the greedy tokens of four single runs", "[real]") {
  const auto* loaded = real(c10::kFloat);
  if (loaded == nullptr) return;
  const std::vector<int64_t> text = golden_json("real_270m.json")["perplexity"]["ids"];
  std::vector<std::vector<int64_t>> prompts;
  for (const int64_t length : {3, 40, 511, 700}) {
    prompts.emplace_back(text.begin(), text.begin() + length);
  }
  const GenerateOptions options{.max_new_tokens = 32, .sampling = kGreedy};
  const auto together = make_engine(loaded->model, {.capacity = 800, .batch = 4});
  const auto batch = generate(*together, prompts, options);
  for (size_t row = 0; row < prompts.size(); ++row) {
    const auto alone = make_engine(loaded->model, {.capacity = 800});
    CAPTURE(prompts[row].size());
    CHECK(batch.rows[row].ids == generate(*alone, {prompts[row]}, options).rows[0].ids);
  }
}

TEST_CASE("perplexity equals transformers', in chunks and whole", "[real]") {
  const auto* loaded = real(c10::kFloat);
  if (loaded == nullptr) return;
  const auto golden = golden_json("real_270m.json")["perplexity"];
  const std::vector<int64_t> ids = golden["ids"];
  const auto engine = make_engine(loaded->model, {.capacity = 4096});
  for (const auto& [chunk, key] : {std::pair{int64_t{512}, "c512"}, {int64_t{0}, "c0"}}) {
    const auto scores = score_tokens(*engine, ids, {.chunk = chunk});
    const double got = std::exp(mean_nll(scores));
    const double want = std::exp(golden[key]["nll"].get<double>());
    std::cout << fmt::format("perplexity {}: {:.4f} (transformers {:.4f})\n", key, got, want);
    CHECK(static_cast<int64_t>(scores.size()) == golden[key]["tokens"].get<int64_t>());
    CHECK(got == Approx(want).epsilon(0.002));
  }
}

TEST_CASE("bfloat16 is as near to float32 as transformers' own bfloat16", "[real]") {
  const auto* exact = real(c10::kFloat);
  const auto* rounded = real(c10::kBFloat16);
  if (exact == nullptr) return;
  const auto golden = golden_json("real_270m.json");
  const auto count = golden["bfloat16"]["tokens"].get<int64_t>();
  const std::vector<int64_t> text = golden["perplexity"]["ids"];
  const auto a = make_engine(exact->model, {.capacity = count});
  const auto b = make_engine(rounded->model, {.kind = EngineKind::kEager, .capacity = count});
  double sum = 0;
  int64_t equal = 0;
  for (int64_t start = 0; start < count; start += 500) {  // 500 rows of logits are 500 MiB
    const std::vector<int64_t> piece(text.begin() + start, text.begin() + start + 500);
    a->append(piece);
    b->append(piece);
    for (const auto& [p, q] : {std::pair{a->logits(Rows::kAll)[0], b->logits(Rows::kAll)[0]}}) {
      const auto log_p = p.log_softmax(-1);
      sum += (log_p.exp() * (log_p - q.log_softmax(-1))).sum().item<double>();
      equal += p.argmax(-1).eq(q.argmax(-1)).sum().item<int64_t>();
    }
  }
  const double kl = sum / static_cast<double>(count);
  // Of transformers' two ways the one that writes scores and softmax out, as this engine does. It is the machine's
  // products that differ: ours came out at 0.00094 on Sapphire Rapids and 0.00105 on Zen 4, theirs at 0.00098 (the
  // golden's) and 0.00100.
  const double theirs = golden["bfloat16"]["eager"]["mean_kl"];
  std::cout << fmt::format(
      "bfloat16: mean KL {:.6f} (transformers {:.6f}), argmax equal {} of {}\n",
      kl,
      theirs,
      equal,
      count);
  CHECK(kl <= 1.1 * theirs);
}

TEST_CASE("a GGUF file and the folder converted from it give the same bits", "[real]") {
  const auto* folder = real(c10::kBFloat16);
  const auto gguf = environment("GEMMA_TORCH_TEST_GGUF");
  if (folder == nullptr || !gguf) {
    std::cout << "Skipped: GEMMA_TORCH_TEST_GGUF is not set. Hint: bash cmake/test.sh sets it\n";
    return;
  }
  const auto from_gguf = load_pretrained(*gguf);
  const auto want = folder->model->named_parameters();
  for (const auto& item : from_gguf.model->named_parameters()) {
    CAPTURE(item.key());
    CHECK(at::equal(item.value(), want[item.key()]));
  }
  CHECK(from_gguf.stop_ids == folder->stop_ids);
}
