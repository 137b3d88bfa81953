// The three sources of a vocabulary: tokenizer.model, tokenizer.json, GGUF.
#include <random>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/text/model_proto.h"
#include "gemma_torch/text/proto_wire.h"
#include "gemma_torch/text/tokenizer.h"
#include "gemma_torch/text/tokenizer_json.h"
#include "gemma_torch/text/vocabulary_rules.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/scratch.h"
#include "support/vocabularies.h"

using namespace gemma_torch;
using nlohmann::json;

namespace gemma_torch {

bool operator==(const Piece& a, const Piece& b) {
  return a.text == b.text && a.score == b.score && a.type == b.type;
}

}  // namespace gemma_torch

namespace {

// What Hugging Face would write for small_vocabulary(), with an empty merge list: it is not read.
json small_tokenizer_json() {
  json vocab = json::object();
  json added = json::array();
  const auto pieces = small_vocabulary().pieces;
  for (size_t id = 0; id < pieces.size(); ++id) {
    const PieceType type = pieces[id].type;
    vocab[pieces[id].text] = id;
    if (type != PieceType::kNormal && type != PieceType::kByte) {
      added.push_back({{"id", id}, {"content", pieces[id].text}, {"special", false}});
    }
  }
  return {
      {"added_tokens", added},
      {"normalizer", {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "\u2581"}}},
      {"model",
       {{"type", "BPE"}, {"byte_fallback", true}, {"vocab", vocab}, {"merges", {{"a", "b"}}}}}};
}

// A ModelProto with one piece and the given flags of the normalizer.
std::string one_piece_model(uint64_t model_type, uint64_t dummy_prefix) {
  ProtoWriter piece, trainer, normalizer, model;
  piece.bytes(1, "<unk>");
  piece.varint(3, 2);
  trainer.varint(3, model_type);
  normalizer.varint(3, dummy_prefix);
  normalizer.varint(4, 0);
  model.bytes(1, piece.message());
  model.bytes(2, trainer.message());
  model.bytes(3, normalizer.message());
  return model.message();
}

std::string json_error(const json& file) {
  return error_of([&] { parse_tokenizer_json(file.dump(), "test"); });
}

std::string vocabulary_error(size_t id, const Piece& piece) {
  auto vocabulary = small_vocabulary();
  vocabulary.pieces[id] = piece;
  return error_of([&] { Tokenizer{vocabulary}; });
}

}  // namespace

TEST_CASE("a written tokenizer.model is read back with every piece", "[tokenizer][files]") {
  const ScratchFolder folder("tokenizer_model");
  const auto vocabulary = small_vocabulary();
  write_file(folder / "tokenizer.model", serialize_tokenizer_model(vocabulary));
  CHECK(read_tokenizer_model(folder / "tokenizer.model").pieces == vocabulary.pieces);
}

TEST_CASE("tokenizer.json gives the pieces of tokenizer.model", "[tokenizer][files]") {
  const auto vocabulary = small_vocabulary();
  const auto read = parse_tokenizer_json(small_tokenizer_json().dump(), "test");
  REQUIRE(read.pieces.size() == vocabulary.pieces.size());
  CHECK(read.pieces == vocabulary.pieces);
}

TEST_CASE("pieces as GGUF stores them become the common form, once", "[tokenizer][files]") {
  auto stored = small_vocabulary();
  stored.pieces[kTwoSpaces].text = "  ";
  stored.pieces[3].type = PieceType::kControl;  // <unk>
  stored.pieces[kTurn].type = PieceType::kUserDefined;
  stored.pieces[kTag + 1].type = PieceType::kControl;  // <unused0>
  stored.pieces[kTag].score = -1000.0F;
  const auto normal = normalize_gguf_vocabulary(stored);
  CHECK(normal.pieces == small_vocabulary().pieces);
  CHECK(normalize_gguf_vocabulary(normal).pieces == normal.pieces);
  CHECK(parse_tokenizer_model(serialize_tokenizer_model(stored), "test").pieces == normal.pieces);
  CHECK(Tokenizer(stored).encode("  <unused0><start_of_turn>") ==
        std::vector<int64_t>{kBos, kTwoSpaces, kTag + 1, kTurn});
}

TEST_CASE("a vocabulary with image pieces gets the soft token as its last", "[tokenizer][files]") {
  auto vocabulary = small_vocabulary();
  vocabulary.pieces[290] = {.text = "<end_of_image>", .type = PieceType::kUserDefined};
  const Tokenizer tokenizer(vocabulary);
  CHECK(tokenizer.size() == 301);
  CHECK(tokenizer.encode("<image_soft_token>") == std::vector<int64_t>{kBos, 300});
  CHECK(tokenizer.decode({300}, /*skip_special=*/true).empty());
}

TEST_CASE("every cut of a tokenizer.model is an error", "[tokenizer][files]") {
  const std::string model = serialize_tokenizer_model(small_vocabulary());
  for (size_t length = 0; length < model.size(); ++length) {
    const std::string_view cut = std::string_view(model).substr(0, length);
    const auto error = error_of([&] { parse_tokenizer_model(cut, "cut.model"); });
    INFO(length);
    CHECK_THAT(error, Catch::StartsWith("[tokenizer.model] ") && Catch::EndsWith(" (cut.model)"));
  }
}

TEST_CASE("damaged bytes in a tokenizer.model give an error or a tokenizer", "[tokenizer][files]") {
  const std::string model = serialize_tokenizer_model(small_vocabulary());
  std::mt19937 random(1);
  int refused = 0;
  for (int round = 0; round < 2000; ++round) {
    std::string damaged = model;
    for (int i = 0; i < 1 + round % 4; ++i) {
      damaged[random() % damaged.size()] = static_cast<char>(random());
    }
    const auto error = error_of([&] {
      const Tokenizer tokenizer(parse_tokenizer_model(damaged, "damaged.model"));
      tokenizer.decode(tokenizer.encode("ab cd\n\n<b>é", {.add_bos = false}));
    });
    refused += error.empty() ? 0 : 1;
    CHECK(error.find('\n') == std::string::npos);
  }
  CHECK(refused > 500);  // seed 1: the rest damages texts and scores, which stay usable
}

TEST_CASE("a tokenizer.model of another kind is refused", "[tokenizer][files]") {
  const auto error = [](uint64_t model_type, uint64_t dummy_prefix) {
    const auto bytes = one_piece_model(model_type, dummy_prefix);
    return error_of([&] { parse_tokenizer_model(bytes, "test"); });
  };
  CHECK(error(2, 0).empty());
  CHECK_THAT(error(1, 0), Catch::Contains("model_type: expected 2 (BPE), got 1"));
  CHECK_THAT(error(2, 1), Catch::Contains("add_dummy_prefix"));
}

TEST_CASE("protobuf numbers and lengths are bounded", "[tokenizer][files]") {
  const auto error = [](std::string_view bytes) {
    return error_of([&] { parse_tokenizer_model(bytes, "test"); });
  };
  CHECK_THAT(error("\x0A\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01"),
             Catch::Contains("expected 18446744073709551615 bytes"));
  CHECK_THAT(error("\x0A\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x02"),
             Catch::Contains("above 64 bits"));
  CHECK_THAT(error("\x0B"), Catch::Contains("wire type 3"));
  CHECK_THAT(error("\x02\x01"), Catch::Contains("field number 0"));
  CHECK_THAT(error("\x08\x01"), Catch::Contains("field 1: expected a string"));
  CHECK_THAT(error("\x0A\x02\x18\x07"), Catch::Contains("expected 1 .. 6, got 7"));
}

TEST_CASE("faults of a vocabulary are named by id", "[tokenizer][files]") {
  const auto byte = [](const std::string& text) {
    return vocabulary_error(20, {.text = text, .type = PieceType::kByte});
  };
  for (const char* text : {"<0x-1>", "<0xG0>", "<0x0a>", "<0x100>", "0x00", "<0x >"}) {
    CHECK_THAT(byte(text), Catch::Contains("piece 20: expected a byte as <0x00> .. <0xFF>"));
  }
  CHECK_THAT(byte("<0x00>"), Catch::Contains("piece 20: <0x00> is given twice"));
  CHECK_THAT(vocabulary_error(20, {.text = "no byte"}),
             Catch::Contains("256 byte pieces or none, got 255"));
  CHECK_THAT(vocabulary_error(280, {.text = ""}), Catch::Contains("piece 280 is empty"));
  CHECK_THAT(vocabulary_error(280, {.text = "\xFF"}), Catch::Contains("piece 280 is not UTF-8"));
  CHECK_THAT(vocabulary_error(280, {.text = "x", .score = NAN}), Catch::Contains("not finite"));
  CHECK_THAT(vocabulary_error(3, {.text = "x"}), Catch::Contains("UNKNOWN, got 0"));
  CHECK_THAT(vocabulary_error(280, {.text = "abc"}), Catch::Contains("sentencepiece refuses"));
  CHECK_THAT(vocabulary_error(8, {.text = std::string("a\0b", 3), .type = PieceType::kUserDefined}),
             Catch::Contains("holds a NUL"));
  CHECK_THAT(error_of([] { Tokenizer{Vocabulary{}}; }), Catch::Contains("UNKNOWN, got 0"));
}

TEST_CASE("a tokenizer.json of the wrong shape is one clear error", "[tokenizer][files]") {
  const auto with = [](const char* pointer, const json& value) {
    json file = small_tokenizer_json();
    file[json::json_pointer(pointer)] = value;
    return json_error(file);
  };
  CHECK_THAT(with("/model/type", "Unigram"), Catch::Contains("expected BPE, got \"Unigram\""));
  CHECK_THAT(with("/model/type", 3), Catch::Contains("type: expected string, got number"));
  CHECK_THAT(with("/model/byte_fallback", false), Catch::Contains("byte_fallback"));
  CHECK_THAT(with("/model/vocab", json::array()),
             Catch::Contains("vocab: expected object, got array"));
  CHECK_THAT(with("/model/vocab/a", -1), Catch::Contains("the id of \"a\""));
  CHECK_THAT(with("/model/vocab/a", 269.5), Catch::Contains("got 269.5"));
  CHECK_THAT(with("/model/vocab/a", uint64_t{1} << 63), Catch::Contains("got 9223372036854775808"));
  CHECK_THAT(with("/model/vocab/a", 300), Catch::Contains("id 300 in a vocabulary of 300 pieces"));
  CHECK_THAT(with("/model/vocab/a", 270), Catch::Contains("id 270 belongs to both"));
  CHECK_THAT(with("/added_tokens/0", 7), Catch::Contains("lacks \"content\""));
  CHECK_THAT(with("/added_tokens/0", {{"content", "x"}}), Catch::Contains("lacks an id"));
  CHECK_THAT(with("/normalizer/type", "NFKC"), Catch::Contains("normalizer"));
  CHECK_THAT(json_error(json::object()), Catch::Contains("lacks \"model\""));
  CHECK_THAT(json_error(json::array()), Catch::Contains("lacks \"model\""));
}

TEST_CASE("text that is no JSON, or JSON too deep, is one clear error", "[tokenizer][files]") {
  const auto error = [](const std::string& text) {
    return error_of([&] { parse_tokenizer_json(text, "test"); });
  };
  CHECK_THAT(error(""), Catch::Equals("[tokenizer.json] not valid JSON at byte 1 (test)"));
  CHECK_THAT(error("{\"model\": \"\xFF\"}"), Catch::Contains("not valid JSON at byte"));
  CHECK_THAT(error(std::string(1'000'000, '[')), Catch::Contains("nested deeper than 64"));
  CHECK_THAT(error("{\"merges\": " + std::string(100'000, '[')), Catch::Contains("nested deeper"));
  const std::string whole = small_tokenizer_json().dump();
  for (size_t length = 0; length < whole.size(); length += 7) {
    CHECK_THAT(error(whole.substr(0, length)), Catch::Contains("not valid JSON"));
  }
}

TEST_CASE("the real vocabulary is the same from every source", "[tokenizer][files][real]") {
  auto vocabularies = real_vocabularies();
  if (vocabularies.empty()) {
    WARN(kNoRealModel);
    return;
  }
  const auto first = normalize_gguf_vocabulary(vocabularies[0].second).pieces;
  for (const auto& [path, vocabulary] : vocabularies) {
    INFO(path);
    const auto pieces = normalize_gguf_vocabulary(vocabulary).pieces;
    REQUIRE(pieces.size() == first.size());
    for (size_t id = 0; id < pieces.size(); ++id) {
      // scores may count from another id; only their order matters, and the goldens test that
      if (pieces[id].text != first[id].text || pieces[id].type != first[id].type) {
        FAIL_CHECK("piece " << id << ": " << pieces[id].text << " is not " << first[id].text);
      }
    }
  }
}
