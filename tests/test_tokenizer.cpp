#include "gemma_torch/text/tokenizer.h"

#include <algorithm>
#include <memory>

#include "support/catch.h"
#include "support/error_of.h"
#include "support/vocabularies.h"

using namespace gemma_torch;
using Ids = std::vector<int64_t>;

namespace {

constexpr EncodeOptions kNoBos = {.add_bos = false};
constexpr EncodeOptions kPlain = {.add_bos = false, .parse_special = false};

int64_t byte_id(int byte) {
  return kFirstByte + byte;
}

}  // namespace

TEST_CASE("plain text is cut by merges in order of score", "[tokenizer]") {
  const Tokenizer tokenizer(small_vocabulary());
  CHECK(tokenizer.encode("abcd", kNoBos) == Ids{kAbc, kD});
  CHECK(tokenizer.encode("cd a", kNoBos) == Ids{kCd, kSpaceA});
  CHECK(tokenizer.encode("<b>a", kNoBos) == Ids{kTag, kA});
}

TEST_CASE("characters without a piece become their bytes", "[tokenizer]") {
  const Tokenizer tokenizer(small_vocabulary());
  CHECK(tokenizer.encode("中", kNoBos) == Ids{byte_id(0xE4), byte_id(0xB8), byte_id(0xAD)});
  CHECK(tokenizer.encode(std::string(1, '\0'), kNoBos) == Ids{byte_id(0)});
}

TEST_CASE("BOS comes first, for an empty text too", "[tokenizer]") {
  const Tokenizer tokenizer(small_vocabulary());
  CHECK(tokenizer.encode("") == Ids{kBos});
  CHECK(tokenizer.encode("a") == Ids{kBos, kA});
  CHECK(tokenizer.encode("", kNoBos).empty());
}

TEST_CASE("special strings are one id, or plain text on request", "[tokenizer]") {
  const Tokenizer tokenizer(small_vocabulary());
  CHECK(tokenizer.encode("a<start_of_turn>b", kNoBos) == Ids{kA, kTurn, kB});
  CHECK(tokenizer.encode("<<bos>", kNoBos) == Ids{byte_id('<'), kBos});
  const Ids plain = tokenizer.encode("a<bos>b", kPlain);
  CHECK(std::find(plain.begin(), plain.end(), kBos) == plain.end());
  CHECK(tokenizer.decode(plain) == "a<bos>b");
}

TEST_CASE("literal U+2581 is not taken for a space beside one", "[tokenizer]") {
  const Tokenizer tokenizer(small_vocabulary());
  CHECK(tokenizer.encode("   ", kNoBos) == Ids{kThreeSpaces});
  CHECK(tokenizer.encode(" ▁▁", kNoBos) == Ids{kSpace, kTwoSpaces});
  CHECK(tokenizer.encode(" ▁▁", kPlain) == Ids{kSpace, kTwoSpaces});
  CHECK(tokenizer.encode("▁▁▁▁a", kNoBos) == Ids{kThreeSpaces, kSpaceA});  // the longest run first
}

TEST_CASE("text is cut at newlines only where no piece spans one", "[tokenizer]") {
  const Tokenizer alone(small_vocabulary());
  CHECK(alone.encode("a\n\n\nb\na", kNoBos) == Ids{kA, kNewline + 1, kNewline, kB, kNewline, kA});
  auto vocabulary = small_vocabulary();
  vocabulary.pieces[kNewline].type = PieceType::kNormal;
  vocabulary.pieces[299] = {.text = "\nb", .score = -299.0F};
  CHECK(Tokenizer(vocabulary).encode("a\nb", kNoBos) == Ids{kA, 299});
}

TEST_CASE("text that is not UTF-8 is refused at its byte", "[tokenizer]") {
  const Tokenizer tokenizer(small_vocabulary());
  const auto refused_at = [&](const std::string& text, const std::string& place) {
    INFO(text);
    CHECK_THAT(error_of([&] { tokenizer.encode(text); }),
               Catch::Contains("at offset " + place + " of"));
  };
  refused_at("ab\xFF", "2");
  refused_at("a\xC3", "1");             // cut short
  refused_at("\xC0\xAF", "0");          // overlong
  refused_at("\xE0\x9F\xBF", "0");      // overlong
  refused_at("é\xED\xA0\x80", "2");     // surrogate
  refused_at("\xF4\x90\x80\x80", "0");  // above U+10FFFF
  refused_at("\xF0\x8F\xBF\xBF", "0");  // overlong
  refused_at("\xE4\xB8<", "0");
  CHECK(error_of([&] {
          tokenizer.encode("\xED\x9F\xBF\xEE\x80\x80\xF4\x8F\xBF\xBF\x7F\xC2\x80");
        }).empty());
}

TEST_CASE("a run of byte pieces is text if all of it is UTF-8", "[tokenizer]") {
  const Tokenizer tokenizer(small_vocabulary());
  CHECK(tokenizer.decode({byte_id(0xC3), byte_id(0xA9)}) == "é");
  CHECK(tokenizer.decode({byte_id(0xC3), byte_id(0xA9), byte_id(0xFF)}) == "\uFFFD\uFFFD\uFFFD");
  CHECK(tokenizer.decode({byte_id(0xC3), kBos, byte_id(0xA9)}) == "\uFFFD<bos>\uFFFD");
  CHECK(tokenizer.decode({byte_id(0xC3), kBos, byte_id(0xA9)}, /*skip_special=*/true) == "é");
  CHECK(tokenizer.decode({byte_id(0xE2), byte_id(0x96), byte_id(0x81), kSpaceA}) == "▁ a");
  CHECK(tokenizer.decode({}).empty());
}

TEST_CASE("an id out of range is an error that names it and the size", "[tokenizer]") {
  const Tokenizer tokenizer(small_vocabulary());
  for (const int64_t id : {int64_t{-1}, int64_t{300}, int64_t{1} << 40}) {
    const auto expected =
        Catch::Equals(fmt::format("[tokenizer] id: expected 0 .. 299, got {}", id));
    CHECK_THAT(error_of([&] { tokenizer.decode({kA, id}); }), expected);
    CHECK_THAT(error_of([&] { tokenizer.piece(id); }), expected);
  }
  CHECK(tokenizer.piece(kSpaceA) == "▁a");
  CHECK(tokenizer.size() == 300);
}

TEST_CASE("specials are looked up by text, absent ones are -1", "[tokenizer]") {
  auto vocabulary = small_vocabulary();
  const Tokenizer whole(vocabulary);
  CHECK(Ids{whole.pad_id(), whole.eos_id(), whole.bos_id(), whole.unk_id()} == Ids{0, 1, 2, 3});
  CHECK(Ids{whole.start_of_turn_id(), whole.end_of_turn_id()} == Ids{4, 5});
  CHECK(whole.stop_ids() == Ids{1});
  CHECK(whole.id_of("nothing") == -1);
  vocabulary.pieces.erase(vocabulary.pieces.begin(), vocabulary.pieces.begin() + 3);
  const Tokenizer bare(vocabulary);
  CHECK(Ids{bare.pad_id(), bare.eos_id(), bare.bos_id(), bare.unk_id()} == Ids{-1, -1, -1, 0});
  CHECK(bare.stop_ids().empty());
  CHECK_THAT(error_of([&] { bare.encode("a"); }), Catch::Contains("no <bos>"));
}

TEST_CASE("a copy outlives its source", "[tokenizer]") {
  auto first = std::make_unique<Tokenizer>(small_vocabulary());
  const Tokenizer copy = *first;
  first.reset();
  CHECK(copy.encode("abcd", kNoBos) == Ids{kAbc, kD});
}

TEST_CASE("the goldens of Hugging Face's tokenizer hold on the real vocabulary",
          "[tokenizer][real]") {
  const auto vocabularies = real_vocabularies();
  if (vocabularies.empty()) {
    WARN(kNoRealModel);
    return;
  }
  const auto goldens = tokenizer_goldens();
  for (const auto& [path, vocabulary] : vocabularies) {
    INFO(path);
    const Tokenizer tokenizer(vocabulary);
    CHECK(tokenizer.size() == 262'145);
    for (const auto& row : goldens.at("encode")) {
      const auto text = row[1].get<std::string>();
      INFO(text);
      CHECK(tokenizer.encode(text, kNoBos) == row[2].get<Ids>());
    }
    for (const auto& row : goldens.at("encode_text_only")) {
      const auto text = row[0].get<std::string>();
      INFO(text);
      CHECK(tokenizer.encode(text, kPlain) == row[1].get<Ids>());
    }
    for (const auto& row : goldens.at("decode")) {
      const auto ids = row.at("ids").get<Ids>();
      CHECK(tokenizer.decode(ids) == row.at("text").get<std::string>());
      CHECK(tokenizer.decode(ids, true) == row.at("text_skip_special").get<std::string>());
    }
  }
}

TEST_CASE("every source gives the same ids, and they decode to the text", "[tokenizer][real]") {
  const auto vocabularies = real_vocabularies();
  if (vocabularies.empty()) {
    WARN(kNoRealModel);
    return;
  }
  const auto goldens = tokenizer_goldens();
  std::string text;
  for (const auto& row : goldens.at("encode")) {
    text += row[1].get<std::string>() + "\n";
  }
  const Ids first = Tokenizer(vocabularies[0].second).encode(text, kPlain);
  for (const auto& [path, vocabulary] : vocabularies) {
    INFO(path);
    const Tokenizer tokenizer(vocabulary);
    CHECK(tokenizer.encode(text, kPlain) == first);
    CHECK((tokenizer.decode(first) == marks_to_spaces(text)));  // too long to print
  }
}
