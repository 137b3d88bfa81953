#include "gemma_torch/text/chat_template.h"

#include <algorithm>

#include "gemma_torch/text/tokenizer.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/vocabularies.h"

using namespace gemma_torch;
using nlohmann::json;
using Ids = std::vector<int64_t>;

namespace {

// A content given in parts, as the template joins them: texts stripped, an image as its special
// string.
std::string content_of(const json& content) {
  if (content.is_string()) {
    return content.get<std::string>();
  }
  std::string joined;
  for (const json& part : content) {
    joined += part.at("type") == "text" ? std::string(strip(part.at("text").get<std::string>()))
                                        : "<start_of_image>";
  }
  return joined;
}

std::vector<ChatMessage> messages_of(const json& list) {
  std::vector<ChatMessage> messages;
  for (const json& message : list) {
    messages.push_back({message.at("role").get<std::string>(), content_of(message.at("content"))});
  }
  return messages;
}

}  // namespace

TEST_CASE("chats render as Hugging Face's template does, errors too", "[chat_template]") {
  const json goldens = tokenizer_goldens();
  int errors = 0;
  for (const json& row : goldens.at("chat")) {
    const auto messages = messages_of(row.at("messages"));
    const bool prompt = row.at("add_generation_prompt").get<bool>();
    INFO(row.dump());
    if (row.contains("error")) {
      const auto error = error_of([&] { render_chat(messages, prompt); });
      CHECK_THAT(error, Catch::Contains("roles must alternate"));
      ++errors;
    } else {
      CHECK(render_chat(messages, prompt) == row.at("text").get<std::string>());
    }
  }
  CHECK(errors == 4);
}

TEST_CASE("without a generation prompt the chat ends with its last turn", "[chat_template]") {
  CHECK(render_chat({{"user", "Hi"}}, false) == "<bos><start_of_turn>user\nHi<end_of_turn>\n");
}

TEST_CASE("chat errors name the message and the role", "[chat_template]") {
  CHECK_THAT(error_of([] { render_chat({}, true); }), Catch::Contains("at least one message"));
  CHECK_THAT(error_of([] { render_chat({{"tool", "x"}}, true); }),
             Catch::Contains("message 0: expected the role") && Catch::Contains("\"tool\""));
  CHECK_THAT(error_of([] { render_chat({{"user", "x"}, {"user", "y"}}, true); }),
             Catch::Contains("message 1") && Catch::Contains("expected assistant, got user"));
}

TEST_CASE("strip removes what Python's str.strip removes", "[chat_template]") {
  CHECK(strip("\u2003\u00A0\x1C a b\u3000\u0085\n\u202F") == "a b");
  CHECK(strip("\u200Bq\u200B") == "\u200Bq\u200B");  // a zero-width space is no white space
  CHECK(strip("\uFEFFq") == "\uFEFFq");
  CHECK(strip(" \n\t").empty());
  CHECK(strip("").empty());
  CHECK(strip("à") == "à");  // its last byte, A0, is no white space of its own
}

TEST_CASE("a next turn appends what the whole chat would hold", "[chat_template]") {
  const std::vector<ChatMessage> start = {{"system", "S"}, {"user", "Hi"}};
  auto whole = start;
  whole.push_back({"assistant", "Yo"});
  whole.push_back({"user", " Bye "});
  const std::string before = render_chat(start, true) + "Yo";
  CHECK(before + "<end_of_turn>" + render_user_turn(" Bye ", /*reply_closed=*/true) ==
        render_chat(whole, true));
  CHECK(before + render_user_turn(" Bye ", /*reply_closed=*/false) == render_chat(whole, true));
}

TEST_CASE("a special string in a message is plain text, one of the frame is one id",
          "[chat_template]") {
  const auto parts = chat_parts({{"user", "a<end_of_turn>b"}}, true);
  REQUIRE(parts.size() == 3);
  CHECK(parts[0].frame);
  CHECK(parts[0].text == "<bos><start_of_turn>");
  CHECK_FALSE(parts[1].frame);
  CHECK(parts[1].text == "user\na<end_of_turn>b");
  CHECK(parts[2].frame);
  CHECK(parts[2].text == "<end_of_turn>\n<start_of_turn>model\n");
}

TEST_CASE("chats encode to Hugging Face's ids, at once or turn by turn", "[chat_template][real]") {
  const auto vocabularies = real_vocabularies();
  if (vocabularies.empty()) {
    WARN(kNoRealModel);
    return;
  }
  const json goldens = tokenizer_goldens();
  const Tokenizer tokenizer(vocabularies[0].second);
  for (const json& row : goldens.at("chat")) {
    if (!row.contains("error")) {
      INFO(row.dump());
      CHECK(tokenizer.encode(row.at("text").get<std::string>(), {.add_bos = false}) ==
            row.at("ids").get<Ids>());
    }
  }
  Ids turns = tokenizer.encode(render_chat({{"user", "Hi"}}, true), {.add_bos = false});
  for (const std::string& text :
       {std::string("Hello!<end_of_turn>"), render_user_turn("Bye", true)}) {
    const Ids more = tokenizer.encode(text, {.add_bos = false});
    turns.insert(turns.end(), more.begin(), more.end());
  }
  CHECK(turns == tokenizer.encode(
                     render_chat({{"user", "Hi"}, {"assistant", "Hello!"}, {"user", "Bye"}}, true),
                     {.add_bos = false}));
}

TEST_CASE("chats in parts encode as in one text, but for special strings in messages",
          "[chat_template][real]") {
  const auto vocabularies = real_vocabularies();
  if (vocabularies.empty()) {
    WARN(kNoRealModel);
    return;
  }
  const Tokenizer tokenizer(vocabularies[0].second);
  const json goldens = tokenizer_goldens();
  int compared = 0;
  for (const json& row : goldens.at("chat")) {
    const bool special_inside = row.at("messages").dump().find("_of_") != std::string::npos ||
                                row.at("messages").dump().find("<bos>") != std::string::npos ||
                                row.at("messages").dump().find("image") != std::string::npos;
    if (!row.contains("error") && !special_inside) {
      INFO(row.dump());
      const auto parts =
          chat_parts(messages_of(row.at("messages")), row.at("add_generation_prompt").get<bool>());
      CHECK(encode_parts(tokenizer, parts) == row.at("ids").get<Ids>());
      ++compared;
    }
  }
  CHECK(compared >= 5);
  const std::vector<ChatMessage> newlines = {{"system", "\n\nS"}, {"user", "Hi"}};
  CHECK(encode_parts(tokenizer, chat_parts(newlines, true)) ==
        tokenizer.encode(render_chat(newlines, true), {.add_bos = false}));
  const auto ids = encode_parts(tokenizer, user_turn_parts("<end_of_turn>", /*reply_closed=*/true));
  CHECK(std::count(ids.begin(), ids.end(), tokenizer.end_of_turn_id()) == 1);
}
