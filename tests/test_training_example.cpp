#include "gemma_torch/adapt/training_example.h"

#include "gemma_torch/adapt/training_data.h"
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

}  // namespace

TEST_CASE("a text stands between <bos> and <eos>, and all of it is learnt", "[training_example]") {
  const auto example = example_of(R"({"text": "ab cd"})");
  CHECK(example.ids == Ids{kBos, kAb, kSpace, kCd, kEos});
  CHECK(targets_of(example) == Ids{1, 2, 3, 4});
  CHECK_FALSE(example.truncated);
  CHECK(example_of(R"({"text": "a\u0000b", "meta": {"id": [1]}})").ids ==
        Ids{kBos, kA, kFirstByte, kB, kEos});
}

TEST_CASE("a completion is encoded apart from its prompt, and alone learnt", "[training_example]") {
  const std::string line = R"({"prompt": "ca", "completion": "bc"})";  // "ab" would be one piece
  const auto example = example_of(line);
  CHECK(example.ids == Ids{kBos, kC, kA, kB, kC, kEos});
  CHECK(targets_of(example) == Ids{3, 4, 5});
  CHECK(targets_of(example_of(line, {.vocab_size = 300, .all_tokens = true})) == range(1, 6));
  const auto special =
      example_of(R"({"prompt": "<start_of_turn>a", "completion": "b<end_of_turn>"})");
  CHECK(special.ids == Ids{kBos, kTurn, kA, kB, kEnd, kEos});
}

TEST_CASE("of a chat the assistant's turns are learnt, each with its end", "[training_example]") {
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

TEST_CASE("a chat has the ids of encode_parts", "[training_example]") {
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

TEST_CASE("ids are taken as they are", "[training_example]") {
  const auto example = example_of(R"({"ids": [299, 0, 5]})");
  CHECK(example.ids == Ids{299, 0, 5});
  CHECK(targets_of(example) == Ids{1, 2});
  const auto pair = example_of(R"({"completion_ids": [7, 8], "prompt_ids": [6]})");
  CHECK(pair.ids == Ids{6, 7, 8});
  CHECK(targets_of(pair) == Ids{1, 2});
  CHECK(targets_of(example_of(R"({"prompt_ids": [6, 5], "completion_ids": [7]})")) == Ids{2});
  CHECK(parse_example(R"({"ids": [1, 2]})", "here", nullptr).ids == Ids{1, 2});
}

TEST_CASE("a malformed line is named by file and number", "[training_example]") {
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

TEST_CASE("text needs a tokenizer whose ids the model has", "[training_example]") {
  CHECK(error_in("{\"ids\": [1, 2]}\n{\"text\": \"a\"}\n", nullptr) ==
        "[training_data] F:2: text: expected ids, there is no tokenizer to encode text with");
  CHECK_THAT(error_of([] { example_of(R"({"text": "a"})", {.vocab_size = 269}); }),
             Catch::Equals("[training_data] here: text: expected token ids below 269, got 269"));
  auto vocabulary = small_vocabulary();
  vocabulary.pieces[1].text = "<end>";
  const Tokenizer without(vocabulary);
  CHECK(error_in("{\"text\": \"a\"}\n", &without) ==
        "[training_data] F:1: text: expected a vocabulary with <bos> and <eos>");
  vocabulary = small_vocabulary();
  vocabulary.pieces[kEnd].text = "<end>";
  const Tokenizer endless(vocabulary);
  CHECK(error_in(R"({"messages": [{"role": "user", "content": "a"}]})", &endless) ==
        "[training_data] F:1: messages: expected a vocabulary with <end_of_turn>");
}

TEST_CASE("the replies of a chat are what gemma chat would have to say",
          "[training_example][real]") {
  const auto vocabularies = real_vocabularies();
  if (vocabularies.empty()) {
    WARN(kNoRealModel);
    return;
  }
  const Tokenizer tokenizer(vocabularies[0].second);
  const auto example = parse_example(
      R"({"messages": [{"role": "user", "content": "2 + 2?"},
                       {"role": "assistant", "content": "It is 4."}]})",
      "here",
      &tokenizer);
  auto want = encode_parts(tokenizer, chat_parts({{"user", "2 + 2?"}}, true));
  const auto prompt = static_cast<int64_t>(want.size());
  const auto reply = tokenizer.encode("It is 4.<end_of_turn>", {.add_bos = false});
  want.insert(want.end(), reply.begin(), reply.end());
  CHECK(targets_of(example) == range(prompt, static_cast<int64_t>(want.size())));
  want.push_back(tokenizer.id_of("\n"));
  CHECK(example.ids == want);
}
