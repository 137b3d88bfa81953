#include "gemma_torch/adapt/training_data.h"

#include <algorithm>
#include <filesystem>
#include <random>

#include "gemma_torch/text/tokenizer.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/lines_file.h"
#include "support/vocabularies.h"

using namespace gemma_torch;
using Ids = std::vector<int64_t>;

namespace {

constexpr int64_t kEos = 1;
constexpr ExampleOptions kSmall{.vocab_size = 300};

const Tokenizer& small_tokenizer() {
  static const Tokenizer tokenizer(small_vocabulary());
  return tokenizer;
}

int64_t open_files() {
  const std::filesystem::directory_iterator files("/proc/self/fd");
  return std::distance(begin(files), end(files));
}

}  // namespace

TEST_CASE("a file that is none is named", "[training_data]") {
  const ScratchFolder folder("gemma_training_data");
  const auto open = [&](const std::string& path, int64_t max_tokens = 512) {
    return error_of(
        [&] { TrainingData(path, nullptr, {.max_tokens = max_tokens, .vocab_size = 300}); });
  };
  const auto missing = folder / "none.jsonl";
  CHECK(open(missing) == "[training_data] " + missing + ": No such file or directory");
  CHECK(open(folder.path()) ==
        "[training_data] " + folder.path().string() + ": expected a regular file, got a folder");
  for (const std::string text : {"", "\n"}) {
    const LinesFile empty(text);
    CHECK(open(empty.path) ==
          "[training_data] " + empty.path + ": expected examples, the file is empty");
  }
  const LinesFile file("{\"ids\": [1, 2]}\n");
  CHECK(open(file.path, 1) ==
        "[training_data] max_tokens: expected at least 2, the first is not predicted, got 1");
  std::filesystem::resize_file(file.path, (size_t{64} << 20) + 18);
  CHECK(open(file.path) ==
        "[training_data] " + file.path + ":2: expected a line of at most 67108864 bytes, got more");
}

TEST_CASE("lines may end as on Windows, and the last with nothing", "[training_data]") {
  for (const std::string text : {"{\"text\": \"a\"}\r\n{\"text\": \"b\"}\r\n",
                                 "{\"text\": \"a\"}\n{\"text\": \"b\"}",
                                 "{\"text\": \"a\"}\n{\"text\": \"b\"}\n \n"}) {
    const LinesFile file(text);
    const TrainingData data(file.path, &small_tokenizer(), kSmall);
    REQUIRE(data.size() == 2);
    CHECK(data.example(1).ids == Ids{kBos, kB, kEos});
    CHECK(data.example(0).ids == Ids{kBos, kA, kEos});
  }
}

TEST_CASE("lines of every kind may stand in one file", "[training_data]") {
  const LinesFile file(R"({"ids": [4, 5]}
{"prompt": "a", "completion": "b"}
{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
{"prompt_ids": [4], "completion_ids": [5, 6]}
{"text": "c", "meta": "from the web"}
)");
  const TrainingData data(file.path, &small_tokenizer(), kSmall);
  REQUIRE(data.size() == 5);
  CHECK(data.targets() == 1 + 2 + 2 + 2 + 2);
  CHECK(data.tokens() == 2 + 4 + data.length(2) + 3 + 3);
  CHECK(data.longest() == data.length(2));
  CHECK(data.example(4).ids == Ids{kBos, kC, kEos});
}

TEST_CASE("what is too long loses its end, and what has no target left is left out",
          "[training_data]") {
  const LinesFile file(id_line(0, 4, 2) + id_line(1, 5, 1) + id_line(2, 6, 3) + id_line(3, 3, 1));
  const TrainingData data(file.path, nullptr, {.max_tokens = 4, .vocab_size = 300});
  REQUIRE(data.size() == 3);
  CHECK(data.truncated() == 1);
  CHECK(data.left_out() == 1);
  CHECK(data.tokens() == 4 + 4 + 3);
  CHECK(data.targets() == 2 + 1 + 1);
  CHECK(data.longest() == 4);
  CHECK(data.line(0) == 1);
  CHECK(data.line(1) == 3);
  CHECK(data.length(2) == 3);
  CHECK(data.example(1).ids == Ids{3, 103, 3, 103});
  CHECK(data.example(1).is_target == std::vector<bool>{false, false, false, true});
  CHECK(data.example(1).truncated);
  CHECK_FALSE(data.example(0).truncated);
  const auto error = error_of([&] { TrainingData(file.path, nullptr, {.max_tokens = 2}); });
  CHECK(error == "[training_data] " + file.path +
                     ": expected targets among the first 2 tokens of a line, got none in 4");
}

TEST_CASE("examples are read from the file in any order", "[training_data]") {
  constexpr int64_t kLines = 4000;  // about 1.6 MB: lines that lie across two reads
  std::string text;
  for (int64_t i = 0; i < kLines; ++i) {
    text += id_line(i, 20 + i % 120);
  }
  const LinesFile file(text);
  std::vector<int64_t> done;
  const TrainingData data(file.path, nullptr, {.vocab_size = 5000}, [&](int64_t at, int64_t total) {
    CHECK(total == static_cast<int64_t>(text.size()));
    done.push_back(at);
  });
  REQUIRE(data.size() == kLines);
  CHECK(done.size() >= 2);
  CHECK(std::is_sorted(done.begin(), done.end()));
  CHECK(done.back() == static_cast<int64_t>(text.size()));
  std::mt19937_64 generator(3);
  for (int draw = 0; draw < 2000; ++draw) {
    const auto i = static_cast<int64_t>(generator() % kLines);
    const auto example = data.example(i);
    REQUIRE(static_cast<int64_t>(example.ids.size()) == 20 + i % 120);
    REQUIRE(example.ids[18] == i + 1);
    REQUIRE(example.ids[19] == i + 101);
    REQUIRE(data.line(i) == i + 1);
  }
  CHECK_THAT(error_of([&] { data.example(kLines); }),
             Catch::Contains("example: expected 0 to 3999, got 4000"));
  CHECK_THAT(error_of([&] { data.length(-1); }), Catch::Contains("expected 0 to 3999, got -1"));
}

TEST_CASE("opening stops when the callback throws, and leaves no file open", "[training_data]") {
  const LinesFile file(id_lines({3, 3}));
  const auto before = open_files();
  for (int i = 0; i < 3; ++i) {
    CHECK(error_of([&] {
            TrainingData(file.path, nullptr, {.vocab_size = 300}, [](int64_t, int64_t) {
              throw Error("stopped");
            });
          }) == "stopped");
    const TrainingData data(file.path, nullptr, {.vocab_size = 300});
    CHECK(open_files() == before + 1);
  }
  CHECK(open_files() == before);
}

TEST_CASE("a file written to since it was opened is refused", "[training_data]") {
  const LinesFile file(id_lines({3, 3}));
  const auto message = "[training_data] " + file.path +
                       ": expected the file as it was opened, it was written to since";
  const TrainingData data(file.path, nullptr, {.vocab_size = 300});
  const auto written = std::filesystem::last_write_time(file.path);
  std::filesystem::last_write_time(file.path, written + std::chrono::seconds(2));
  CHECK(error_of([&] { data.example(0); }) == message);
  std::filesystem::last_write_time(file.path, written);
  CHECK(data.example(0).ids.size() == 3);
  std::ofstream(file.path, std::ios::app) << "\n";
  CHECK(error_of([&] { data.example(0); }) == message);
}

TEST_CASE("a line that no longer holds what it did is refused", "[training_data]") {
  const LinesFile file("{\"ids\": [1, 101]}\n");
  const TrainingData data(file.path, nullptr, {.vocab_size = 300});
  const auto written = std::filesystem::last_write_time(file.path);
  std::ofstream(file.path) << "{\"ids\": [1,1,11]}\n";
  std::filesystem::last_write_time(file.path, written);  // as two writes in one tick of the clock
  CHECK(error_of([&] { data.example(0); }) ==
        "[training_data] " + file.path +
            ":1: expected 2 tokens as when the file was opened, got 3");
}

TEST_CASE("a file written to while it is opened is refused", "[training_data]") {
  const LinesFile file(id_lines(std::vector<int64_t>(3000, 100)));  // more than one read
  CHECK(error_of([&] {
          TrainingData(file.path, nullptr, {.vocab_size = 5000}, [&](int64_t, int64_t) {
            std::ofstream(file.path, std::ios::app) << "{";
          });
        }) == "[training_data] " + file.path +
                  ": expected the file as it was opened, it was written to since");
}

TEST_CASE("a file replaced under its name is the one that was opened", "[training_data]") {
  const LinesFile file(id_lines({3, 4}));
  const TrainingData data(file.path, nullptr, {.vocab_size = 300});
  std::ofstream(file.path + ".new") << id_lines({5});
  std::filesystem::rename(file.path + ".new", file.path);
  CHECK(data.example(1).ids == Ids{2, 102, 2, 102});
}
