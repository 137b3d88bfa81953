#include "gemma_torch/text/stream_decoder.h"

#include <random>

#include "gemma_torch/text/tokenizer.h"
#include "gemma_torch/text/utf8.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/vocabularies.h"

using namespace gemma_torch;
using Ids = std::vector<int64_t>;

namespace {

// The rule written down once more, on whole runs: specials out, then byte runs, then spaces.
std::string decode_by_runs(const Tokenizer& tokenizer, Ids ids, bool skip_special) {
  if (skip_special) {
    std::erase_if(ids, [&](int64_t id) { return tokenizer.is_special(id); });
  }
  std::string text;
  for (size_t i = 0; i < ids.size();) {
    std::string run;
    for (; i < ids.size() && tokenizer.byte_value(ids[i]) >= 0; ++i) {
      run.push_back(static_cast<char>(tokenizer.byte_value(ids[i])));
    }
    const size_t bytes = run.size();
    if (!is_utf8(run)) {
      run.clear();
      for (size_t k = 0; k < bytes; ++k) {
        run += "\uFFFD";
      }
    }
    text += run;
    if (bytes == 0) {
      text += marks_to_spaces(tokenizer.piece(ids[i++]));
    }
  }
  return text;
}

// Half of the ids are bytes or specials, so that runs form, break, and cross specials.
Ids random_ids(std::mt19937& random, const Tokenizer& tokenizer, int64_t first_byte) {
  Ids ids(1 + random() % 24);
  for (int64_t& id : ids) {
    const auto draw = static_cast<int64_t>(random());
    switch (random() % 4) {
      case 0:
        id = first_byte + draw % 256;
        break;
      case 1:
        id = first_byte + (draw % 2 == 0 ? 0xC3 : 0xA9);
        break;  // é, in either order
      case 2:
        id = draw % 6;
        break;
      default:
        id = draw % tokenizer.size();
    }
  }
  return ids;
}

void check_streams(const Tokenizer& tokenizer, int rounds) {
  const int64_t first_byte = tokenizer.id_of("<0x00>");
  std::mt19937 random(1);
  for (int round = 0; round < rounds; ++round) {
    const Ids ids = random_ids(random, tokenizer, first_byte);
    const bool skip_special = round % 2 == 1;
    StreamDecoder decoder(tokenizer, skip_special);
    std::string streamed;
    for (const int64_t id : ids) {
      const std::string text = decoder.push(id);
      REQUIRE(is_utf8(text));
      streamed += text;
    }
    streamed += decoder.flush();
    CAPTURE(ids);
    CHECK(streamed == tokenizer.decode(ids, skip_special));
    CHECK(streamed == decode_by_runs(tokenizer, ids, skip_special));
  }
}

}  // namespace

TEST_CASE("text comes as soon as it is certain", "[stream_decoder]") {
  const Tokenizer tokenizer(small_vocabulary());
  StreamDecoder decoder(tokenizer);
  CHECK(decoder.push(kSpaceA) == " a");
  CHECK(decoder.push(kFirstByte + 0xC3).empty());
  CHECK(decoder.push(kFirstByte + 0xA9).empty());
  CHECK(decoder.push(kB) == "éb");
  CHECK(decoder.push(kFirstByte + 0xC3).empty());
  CHECK(decoder.flush() == "\uFFFD");
  CHECK(decoder.flush().empty());
}

TEST_CASE("a skipped special shows nothing and breaks no run", "[stream_decoder]") {
  const Tokenizer tokenizer(small_vocabulary());
  StreamDecoder decoder(tokenizer, /*skip_special=*/true);
  CHECK(decoder.push(kBos).empty());
  CHECK(decoder.push(kFirstByte + 0xC3).empty());
  CHECK(decoder.push(kTurn).empty());
  CHECK(decoder.push(kFirstByte + 0xA9).empty());
  CHECK(decoder.flush() == "é");
}

TEST_CASE("an id out of range is an error and loses nothing", "[stream_decoder]") {
  const Tokenizer tokenizer(small_vocabulary());
  StreamDecoder decoder(tokenizer);
  decoder.push(kFirstByte + 'x');
  CHECK_THAT(error_of([&] { decoder.push(300); }), Catch::Contains("got 300"));
  CHECK(decoder.flush() == "x");
}

TEST_CASE("streamed text equals decoded text on random ids", "[stream_decoder]") {
  check_streams(Tokenizer(small_vocabulary()), 10'000);
}

TEST_CASE("streamed text equals decoded text on the real vocabulary", "[stream_decoder][real]") {
  const auto vocabularies = real_vocabularies();
  if (vocabularies.empty()) {
    WARN(kNoRealModel);
    return;
  }
  check_streams(Tokenizer(vocabularies[0].second), 10'000);
}
