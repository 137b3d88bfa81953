// New models and the long texts they are trained on.

#include <ATen/Functions.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>

#include "gemma_torch/adapt/new_model.h"
#include "gemma_torch/adapt/text_windows.h"
#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/pretrained.h"
#include "gemma_torch/text/tokenizer.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/lines_file.h"
#include "support/scratch.h"
#include "support/small_models.h"
#include "support/vocabularies.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

double deviation(const at::Tensor& x) {
  return x.to(at::kFloat).std().item<double>();
}

std::string written(const std::string& text, int64_t max_tokens) {
  const LinesFile file(text);
  write_text_windows(file.path,
                     Tokenizer(small_vocabulary()),
                     file.path + ".out",
                     {.max_tokens = max_tokens, .on_progress = {}});
  return read_file(file.path + ".out");
}

// The ids of all windows one after the other, and how long each was.
std::pair<std::vector<int64_t>, std::vector<size_t>> windows(const std::string& lines) {
  std::pair<std::vector<int64_t>, std::vector<size_t>> found;
  std::istringstream rows(lines);
  for (std::string line; std::getline(rows, line);) {
    const auto ids = nlohmann::json::parse(line).at("ids").get<std::vector<int64_t>>();
    CHECK(ids[0] == kBos);
    found.first.insert(found.first.end(), ids.begin() + 1, ids.end());
    found.second.push_back(ids.size());
  }
  return found;
}

}  // namespace

TEST_CASE("a new model is drawn as the reference draws, by its seed", "[from_scratch]") {
  auto cfg = small_config(at::kFloat);
  cfg.tie_word_embeddings = GENERATE(false, true);
  const auto model = new_model(cfg, 3);
  const auto& fc1 = model->blocks->at<TransformerBlockImpl>(0).ff->fc1->weight;
  const auto bound = 1 / std::sqrt(128.0);
  CHECK(fc1.abs().max().item<double>() < bound);
  CHECK(deviation(fc1) == Approx(bound / std::sqrt(3.0)).epsilon(0.02));
  CHECK(model->final_norm->scale.abs().max().item<double>() == 0);
  const auto& embedding = model->tok_emb->weight;
  CHECK(model->out_head->weight.is_same(embedding) == cfg.tie_word_embeddings);
  CHECK(deviation(embedding) == Approx(cfg.tie_word_embeddings ? bound : 1.0).epsilon(0.02));
  torch::manual_seed(3);
  const Gemma3Model reference(cfg);  // which the notebook's goldens vouch for
  CHECK(at::equal(reference->blocks->at<TransformerBlockImpl>(3).ff->fc3->weight,
                  model->blocks->at<TransformerBlockImpl>(3).ff->fc3->weight));
  CHECK(at::equal(new_model(cfg, 3)->tok_emb->weight, embedding));
  CHECK_FALSE(at::equal(new_model(cfg, 4)->tok_emb->weight, embedding));
}

TEST_CASE("a new model's folder loads as it was drawn, with its tokenizer", "[from_scratch]") {
  const ScratchFolder scratch("gemma_new_model");
  const auto file = scratch / "vocabulary.bin";  // what it holds decides, not its name
  write_file(file, serialize_tokenizer_model(small_vocabulary()));
  auto cfg = small_config(GENERATE(at::kFloat, at::kBFloat16));
  cfg.tie_word_embeddings = GENERATE(false, true);
  const auto model = new_model(cfg, 3);
  {
    AtomicFolder out(scratch / "model");
    write_new_model(model, file, out);
    out.commit();
  }
  const auto loaded = load_pretrained(scratch / "model");
  const auto expected = hf_weights(model), found = hf_weights(loaded.model);
  REQUIRE(found.size() == expected.size());
  for (const auto& [name, tensor] : expected) {
    CHECK(at::equal(found.at(name), tensor));
  }
  REQUIRE(loaded.tokenizer.has_value());
  CHECK(loaded.tokenizer->encode("abc", {.add_bos = false}) == std::vector<int64_t>{kAbc});
  CHECK(loaded.stop_ids == std::vector<int64_t>{loaded.tokenizer->eos_id()});
  const auto config = read_json(scratch / "model", "config.json");
  CHECK(config.at("bos_token_id") == kBos);

  cfg.vocab_size = 299;
  AtomicFolder small(scratch / "small");
  CHECK_THAT(error_of([&] { write_new_model(new_model(cfg, 3), file, small); }),
             Catch::Contains("vocab_size: expected at least the 300 pieces"));
  CHECK_THAT(error_of([&] { write_new_model(model, scratch / "none", small); }),
             Catch::Contains("none: no such file"));
  CHECK_THAT(error_of([&] { write_new_model(model, scratch.path(), small); }),
             Catch::Contains("found neither"));
}

TEST_CASE("a text is cut into windows that hold each of its tokens once", "[from_scratch]") {
  std::string text;
  for (int i = 0; i < 6000; ++i) {  // more than is encoded at a time
    text += i % 7 == 0 ? "ab cd\n\n" : i % 5 == 0 ? "<eos> \xC3\xA9 abc\r\n" : "a  bcdefgh abc\n";
  }
  const Tokenizer tokenizer(small_vocabulary());
  const auto whole = tokenizer.encode(text, {.add_bos = false, .parse_special = false});
  CHECK(std::find(whole.begin(), whole.end(), tokenizer.eos_id()) == whole.end());
  const auto [ids, lengths] = windows(written(text, 50));
  CHECK(ids == whole);
  REQUIRE(lengths.size() == (whole.size() + 48) / 49);
  CHECK(std::all_of(lengths.begin(), lengths.end() - 1, [](size_t n) { return n == 50; }));
  CHECK(lengths.back() == 2 + (whole.size() - 1) % 49);
  // Newlines that are one piece, and stand where a piece of the file ends.
  const auto split = std::string(65'531, 'a') + "\ncd\n\n\nab";
  CHECK(windows(written(split, 50)).first ==
        tokenizer.encode(split, {.add_bos = false, .parse_special = false}));
  CHECK(windows(written("ab", 50)).first == std::vector<int64_t>{kAb});
  CHECK(windows(written("\n\n\n", 50)).first.size() == 2);
}

TEST_CASE("a text that is none is named, with the line", "[from_scratch]") {
  const auto said = [](const std::string& text, int64_t max_tokens = 50) {
    return error_of([&] { written(text, max_tokens); });
  };
  CHECK_THAT(said(""), Catch::Contains("data.jsonl: expected a text, the file is empty"));
  CHECK_THAT(said("a\nb\n\xFFz"), Catch::Contains("data.jsonl:3: expected UTF-8, got byte 0xff"));
  CHECK_THAT(said(std::string(70'000, 'a') + "\n\n\xFF"), Catch::Contains("data.jsonl:3: "));
  CHECK_THAT(said("a", 1), Catch::Contains("max_tokens: expected at least 2"));
  CHECK_THAT(error_of([] {
               write_text_windows("/nowhere", Tokenizer(small_vocabulary()), "/nowhere/out");
             }),
             Catch::Contains("/nowhere: expected a file, found none"));
}
