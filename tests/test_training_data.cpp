#include "gemma_torch/adapt/training_data.h"

#include <algorithm>
#include <filesystem>
#include <random>

#include "gemma_torch/text/chat_template.h"
#include "gemma_torch/text/tokenizer.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/lines_file.h"
#include "support/vocabularies.h"

using namespace gemma_torch;
using Ids = std::vector<int64_t>;

namespace {

constexpr int64_t kEos = 1, kEnd = 5, kE = 273;
constexpr ExampleOptions kSmall{.vocab_size = 300};

const Tokenizer& small_tokenizer() {
  static const Tokenizer tokenizer(small_vocabulary());
  return tokenizer;
}

int64_t byte_id(char c) {
  return kFirstByte + static_cast<unsigned char>(c);
}

Example example_of(const std::string& line, const ExampleOptions& options = kSmall) {
  return parse_example(line, "here", &small_tokenizer(), options);
}

// The tokens that are to be predicted, by place.
Ids targets_of(const Example& example) {
  Ids places;
  REQUIRE(example.is_target.size() == example.ids.size());
  for (size_t t = 0; t < example.ids.size(); ++t) {
    if (example.is_target[t]) {
      places.push_back(static_cast<int64_t>(t));
    }
  }
  return places;
}

Ids range(int64_t begin, int64_t end) {
  Ids places;
  for (auto t = begin; t < end; ++t) {
    places.push_back(t);
  }
  return places;
}

std::string error_in(const std::string& text, const Tokenizer* tokenizer = &small_tokenizer()) {
  const LinesFile file(text);
  auto error = error_of([&] { TrainingData(file.path, tokenizer, kSmall); });
  const auto at = error.find(file.path);
  return at == std::string::npos ? error : error.replace(at, file.path.size(), "F");
}

int64_t open_files() {
  const std::filesystem::directory_iterator files("/proc/self/fd");
  return std::distance(begin(files), end(files));
}

}  // namespace

TEST_CASE("a text stands between <bos> and <eos>, and all of it is learnt", "[training_data]") {
  const auto example = example_of(R"({"text": "ab cd"})");
  CHECK(example.ids == Ids{kBos, kAb, kSpace, kCd, kEos});
  CHECK(targets_of(example) == Ids{1, 2, 3, 4});
  CHECK_FALSE(example.truncated);
  CHECK(example_of(R"({"text": "a\u0000b", "meta": {"id": [1]}})").ids ==
        Ids{kBos, kA, kFirstByte, kB, kEos});
}

TEST_CASE("a completion is encoded apart from its prompt, and alone learnt", "[training_data]") {
  const std::string line = R"({"prompt": "ca", "completion": "bc"})";  // "ab" would be one piece
  const auto example = example_of(line);
  CHECK(example.ids == Ids{kBos, kC, kA, kB, kC, kEos});
  CHECK(targets_of(example) == Ids{3, 4, 5});
  CHECK(targets_of(example_of(line, {.vocab_size = 300, .all_tokens = true})) == range(1, 6));
  const auto special =
      example_of(R"({"prompt": "<start_of_turn>a", "completion": "b<end_of_turn>"})");
  CHECK(special.ids == Ids{kBos, kTurn, kA, kB, kEnd, kEos});
}

TEST_CASE("of a chat the assistant's turns are learnt, each with its end", "[training_data]") {
  const auto example = example_of(R"({"messages": [{"role": "user", "content": " a "},
    {"role": "assistant", "content": "b "}, {"role": "user", "content": "c"},
    {"role": "model", "content": "de"}]})");
  const Ids user = {byte_id('u'), byte_id('s'), kE, byte_id('r'), kNewline};
  const Ids model = {byte_id('m'), byte_id('o'), kD, kE, byte_id('l'), kNewline};
  Ids want = {kBos};
  const auto add = [&](const Ids& more) { want.insert(want.end(), more.begin(), more.end()); };
  Ids targets;
  add({kTurn});
  add(user);
  add({kA, kEnd, kNewline, kTurn});
  add(model);
  targets = range(static_cast<int64_t>(want.size()), static_cast<int64_t>(want.size()) + 2);
  add({kB, kEnd, kNewline, kTurn});
  add(user);
  add({kC, kEnd, kNewline, kTurn});
  add(model);
  const auto last = range(static_cast<int64_t>(want.size()), static_cast<int64_t>(want.size()) + 3);
  targets.insert(targets.end(), last.begin(), last.end());
  add({kD, kE, kEnd, kNewline});
  CHECK(example.ids == want);
  CHECK(targets_of(example) == targets);
}

TEST_CASE("a chat has the ids of encode_parts", "[training_data]") {
  const std::vector<ChatMessage> messages = {{"system", "\n\na"},
                                             {"user", "b<end_of_turn>"},
                                             {"system", "c"},
                                             {"user", "\u00e9 "},
                                             {"assistant", "\nmodel\nab<start_of_turn>"}};
  nlohmann::json line;
  for (const auto& message : messages) {
    line["messages"].push_back({{"role", message.role}, {"content", message.content}});
  }
  const auto example = example_of(line.dump());
  const auto parts = chat_parts(messages, /*add_generation_prompt=*/false);
  CHECK(example.ids == encode_parts(small_tokenizer(), parts));
  Ids learnt;
  for (const auto t : targets_of(example)) {
    learnt.push_back(example.ids[static_cast<size_t>(t)]);
  }
  auto reply = small_tokenizer().encode("model\nab<start_of_turn>",
                                        {.add_bos = false, .parse_special = false});
  reply.push_back(kEnd);
  CHECK(learnt == reply);
  const auto all = example_of(line.dump(), {.vocab_size = 300, .all_tokens = true});
  CHECK(targets_of(all) == range(1, static_cast<int64_t>(all.ids.size())));
}

TEST_CASE("ids are taken as they are", "[training_data]") {
  const auto example = example_of(R"({"ids": [299, 0, 5]})");
  CHECK(example.ids == Ids{299, 0, 5});
  CHECK(targets_of(example) == Ids{1, 2});
  const auto pair = example_of(R"({"completion_ids": [7, 8], "prompt_ids": [6]})");
  CHECK(pair.ids == Ids{6, 7, 8});
  CHECK(targets_of(pair) == Ids{1, 2});
  CHECK(targets_of(example_of(R"({"prompt_ids": [6, 5], "completion_ids": [7]})")) == Ids{2});
  CHECK(parse_example(R"({"ids": [1, 2]})", "here", nullptr).ids == Ids{1, 2});
}

TEST_CASE("a malformed line is named by file and number", "[training_data]") {
  const std::string kinds =
      "text, prompt and completion, messages, ids, or prompt_ids and completion_ids";
  const auto chat = [](const std::string& messages) { return R"({"messages": )" + messages + "}"; };
  const std::vector<std::pair<std::string, std::string>> cases = {
      {R"([{"text": "a"}])",
       "expected a JSON object, got an array. Hint: one object a line, no list around them"},
      {"3", "expected a JSON object, got 3. Hint: one object a line, no list around them"},
      {"{}", "fields: expected " + kinds + ", got none"},
      {R"({"meta": 1})", "fields: expected " + kinds + ", got none"},
      {R"({"text": "a", "label": 1})", R"("label": expected only )" + kinds + ", and meta"},
      {R"({"[x] y": "a"})", R"("[x] y": expected only )" + kinds + ", and meta"},
      {R"({"text": "a", "prompt": "a"})", "fields: expected " + kinds + ", got prompt, text"},
      {R"({"prompt": "a"})", "fields: expected " + kinds + ", got prompt"},
      {R"({"prompt": "a", "completion_ids": [1]})",
       "fields: expected " + kinds + ", got completion_ids, prompt"},
      {R"({"text": 3})", "text: expected a text, got 3"},
      {R"({"text": null})", "text: expected a text, got null"},
      {R"({"text": ["a"]})", "text: expected a text, got an array"},
      {R"({"text": ""})", "text: expected some text, got an empty one"},
      {R"({"text": "<bos>a"})",
       "text: expected a text without <bos>, which is added, got one that begins with it"},
      {R"({"prompt": "", "completion": "a"})", "prompt: expected some text, got an empty one"},
      {R"({"prompt": "a", "completion": ""})", "completion: expected some text, got an empty one"},
      {R"({"prompt": "a", "completion": true})", "completion: expected a text, got true"},
      {R"({"ids": 3})", "ids: expected a list of token ids, got 3"},
      {R"({"ids": []})", "ids: expected a list of token ids, got none"},
      {R"({"ids": null})", "ids: expected a list of token ids, got null"},
      {R"({"ids": [1]})", "ids: expected at least 2, the first is not predicted, got 1"},
      {R"({"ids": [1, 300]})", "ids[1]: expected an id from 0 to 299, got 300"},
      {R"({"ids": [-1, 3]})", "ids[0]: expected an id from 0 to 299, got -1"},
      {R"({"ids": [1, 2, 2.0]})", "ids[2]: expected an id from 0 to 299, got 2.0"},
      {R"({"ids": [18446744073709551615, 1]})",
       "ids[0]: expected an id from 0 to 299, got 18446744073709551615"},
      {R"({"prompt_ids": [1], "completion_ids": []})",
       "completion_ids: expected a list of token ids, got none"},
      {R"({"prompt_ids": ["1"], "completion_ids": [1]})",
       R"(prompt_ids[0]: expected an id from 0 to 299, got "1")"},
      {chat("[]"), "messages: expected a list of messages, got none"},
      {chat(R"("a")"), R"(messages: expected a list of messages, got "a")"},
      {chat(R"(["a"])"), R"(messages[0]: expected an object with role and content, got "a")"},
      {chat(R"([{"role": "user"}])"), "messages[0].content: expected a text, got none"},
      {chat(R"([{"role": 1, "content": "a"}])"), "messages[0].role: expected a text, got 1"},
      {chat(R"([{"role": "user", "content": "a", "name": "b"}])"),
       R"(messages[0]: expected role and content only, got "name" too)"},
      {chat(R"([{"role": "user", "content": "a"}, {"role": "assistant", "content": " \n"}])"),
       "messages[1].content: expected some text, got white space"},
      {chat(R"([{"role": "user", "content": "a"}])"),
       "messages: expected the last to be the assistant's, got one of user"},
      {chat(R"([{"role": "assistant", "content": "a"}])"),
       "message 0: roles must alternate, user first: expected user, got assistant"},
      {chat(R"([{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}])"),
       "message 0: expected the role user, assistant, model or system, got \"tool\""},
      {R"({"text": "a", "text": "b"})", R"(key "text" appears twice (counted in this line))"},
      {"{\"text\": \"a\xff\"}", "expected UTF-8, got byte 0xff at byte 11 of the line"},
      {std::string("{\"text\": \"a\"}\0", 14), "expected text, got a NUL at byte 13 of the line"},
      {"\xEF\xBB\xBF{\"text\": \"a\"}", "expected no byte order mark, got one"},
      {"", "expected an example, got a blank line"},
      {" \t\r", "expected an example, got a blank line"},
  };
  for (const auto& [line, message] : cases) {
    INFO(line);
    const std::string good = "{\"text\": \"a\"}\n";
    CHECK(error_in(good + good + line + "\n" + good) == "[training_data] F:3: " + message);
  }
  for (const std::string line : {"{\"text\": a}",
                                 "{\"text\": \"a\"",
                                 "{'text': 'a'}",
                                 "{} {}",
                                 R"({"text": "\ud800"})",
                                 "{\"text\": \"a\tb\"}",
                                 "nan"}) {
    INFO(line);
    CHECK_THAT(error_in("{\"text\": \"a\"}\n" + line + "\n"),
               Catch::StartsWith("[training_data] F:2: [json.exception.parse_error.101]") &&
                   Catch::EndsWith("(counted in this line)"));
  }
}

TEST_CASE("text needs a tokenizer whose ids the model has", "[training_data]") {
  CHECK(error_in("{\"ids\": [1, 2]}\n{\"text\": \"a\"}\n", nullptr) ==
        "[training_data] F:2: text: expected ids, there is no tokenizer to encode text with");
  CHECK_THAT(error_of([] { example_of(R"({"text": "a"})", {.vocab_size = 269}); }),
             Catch::Equals("[training_data] here: text: expected token ids below 269, got 269"));
  auto vocabulary = small_vocabulary();
  vocabulary.pieces[1].text = "<end>";
  const Tokenizer without(vocabulary);
  CHECK(error_in("{\"text\": \"a\"}\n", &without) ==
        "[training_data] F:1: text: expected a vocabulary with <bos> and <eos>");
}

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
  CHECK(error_in("") == "[training_data] F: expected examples, the file is empty");
  CHECK(error_in("\n") == "[training_data] F: expected examples, the file is empty");
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
  CHECK(targets_of(data.example(1)) == Ids{3});
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
  // The same size and time, as two writes in one tick of the clock leave them.
  std::ofstream(file.path) << id_lines({2, 3}) + "    ";
  REQUIRE(std::filesystem::file_size(file.path) == id_lines({3, 3}).size());
  std::filesystem::last_write_time(file.path, written);
  CHECK_THAT(error_of([&] { data.example(0); }),
             Catch::StartsWith("[training_data] " + file.path + ":1: "));
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
