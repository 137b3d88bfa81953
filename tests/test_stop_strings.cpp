#include "gemma_torch/text/stop_strings.h"

#include <random>

#include "support/catch.h"
#include "support/error_of.h"

using namespace gemma_torch;

namespace {

// Shown text when `text` is pushed in the given parts and then ends.
std::string shown(StopStrings& stops, const std::vector<std::string>& parts) {
  std::string all;
  for (const std::string& part : parts) {
    all += stops.push(part);
  }
  return all + stops.flush();
}

std::string shown(std::vector<std::string> stops, const std::vector<std::string>& parts) {
  StopStrings filter(std::move(stops));
  return shown(filter, parts);
}

}  // namespace

TEST_CASE("text ends where a stop string begins", "[stop_strings]") {
  StopStrings stops({"END"});
  CHECK(stops.push("one EN") == "one ");  // may be the begin of END
  CHECK_FALSE(stops.stopped());
  CHECK(stops.push("Dtwo").empty());
  CHECK(stops.stopped());
  CHECK(stops.matched() == "END");
  CHECK(stops.push("three").empty());
  CHECK(stops.flush().empty());
}

TEST_CASE("what was held back is shown once it cannot match", "[stop_strings]") {
  StopStrings stops({"END", "\n\n"});
  CHECK(stops.push("E").empty());
  CHECK(stops.push("EN") == "E");
  CHECK(stops.push("G\n") == "ENG");
  CHECK(stops.flush() == "\n");
  CHECK_FALSE(stops.stopped());
}

TEST_CASE("a repeated begin is not lost", "[stop_strings]") {
  CHECK(shown({"aab"}, {"a", "a", "a", "b", "c"}) == "a");
  CHECK(shown({"abab!"}, {"ab", "ab", "ab", "!"}) == "ab");
}

TEST_CASE("the stop string that is complete first wins, then the longest", "[stop_strings]") {
  CHECK(shown({"abcd", "bc"}, {"xabcd"}) == "xa");  // bc ends before abcd does
  CHECK(shown({"c", "abc"}, {"xabc"}) == "x");      // both end together
  CHECK(shown({"abc", "c"}, {"xabc"}) == "x");
  CHECK(shown({"ab", "abc"}, {"xabc"}) == "x");
  StopStrings stops({"ab", "abc"});
  stops.push("abc");
  CHECK(stops.matched() == "ab");
}

TEST_CASE("no stop string lets all pass, an empty one is an error", "[stop_strings]") {
  CHECK(shown(std::vector<std::string>{}, {"a", "", "b"}) == "ab");
  CHECK_THAT(error_of([] { StopStrings({"a", ""}); }), Catch::Contains("is empty"));
}

TEST_CASE("the outcome does not depend on how text is cut", "[stop_strings]") {
  std::mt19937 random(1);
  const auto word = [&](size_t length) {
    std::string text(length, ' ');
    for (char& c : text) {
      c = static_cast<char>('a' + random() % 2);
    }
    return text;
  };
  for (int round = 0; round < 5'000; ++round) {
    const std::vector<std::string> list = {word(1 + random() % 6), word(3 + random() % 4)};
    const std::string text = word(random() % 30);
    std::vector<std::string> parts;
    for (size_t at = 0; at < text.size();) {
      parts.push_back(text.substr(at, 1 + random() % 4));
      at += parts.back().size();
    }
    StopStrings whole(list);
    StopStrings cut(list);
    CAPTURE(list, text, parts);
    CHECK(shown(whole, {text}) == shown(cut, parts));
    CHECK(whole.matched() == cut.matched());
    CHECK(whole.stopped() ==
          (text.find(list[0]) != std::string::npos || text.find(list[1]) != std::string::npos));
  }
}
