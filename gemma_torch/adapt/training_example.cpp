#include "gemma_torch/adapt/training_example.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "gemma_torch/base/error.h"
#include "gemma_torch/io/file_bytes.h"
#include "gemma_torch/io/strict_json.h"
#include "gemma_torch/text/chat_template.h"
#include "gemma_torch/text/tokenizer.h"
#include "gemma_torch/text/utf8.h"

namespace gemma_torch {
namespace {

using Json = nlohmann::json;

constexpr int kDepth = 64;  // a line needs three; "meta" may hold what it likes
constexpr const char* kKinds =
    "text, prompt and completion, messages, ids, or prompt_ids and completion_ids";

// A value for a message: short ones as written.
std::string shown(const Json& value) {
  return value.is_structured() ? fmt::format("an {}", value.type_name()) : printable(value.dump());
}

void append(Example& example, const std::vector<int64_t>& ids, bool target) {
  example.ids.insert(example.ids.end(), ids.begin(), ids.end());
  example.is_target.resize(example.ids.size(), target);
}

// Messages here begin with the field: parse_example() puts operation and place before them.
const std::string& text_of(const Json& json, const std::string& name, const std::string& where) {
  const auto found = json.find(name);
  if (found == json.end() || !found->is_string()) {
    fail("{}: expected a text, got {}", where, found == json.end() ? "none" : shown(*found));
  }
  const auto& text = found->get_ref<const std::string&>();
  check(!text.empty(), "{}: expected some text, got an empty one", where);
  return text;
}

class LineReader {
 public:
  LineReader(const Json& json, const Tokenizer* tokenizer, int64_t vocab_size)
      : json_(json), tokenizer_(tokenizer), vocab_size_(vocab_size) {}

  Example text() const {
    Example example;
    append(example, encode("text", /*add_bos=*/true), true);
    append(example, {tokenizer_->eos_id()}, true);
    return example;
  }

  Example pair() const {
    Example example;
    append(example, encode("prompt", /*add_bos=*/true), false);
    append(example, encode("completion", /*add_bos=*/false), true);
    append(example, {tokenizer_->eos_id()}, true);
    return example;
  }

  Example ids() const {
    Example example;
    append(example, ids_of("ids"), true);
    check(example.ids.size() > 1, "ids: expected at least 2, the first is not predicted, got 1");
    return example;
  }

  Example id_pair() const {
    Example example;
    append(example, ids_of("prompt_ids"), false);
    append(example, ids_of("completion_ids"), true);
    return example;
  }

  Example chat() const {
    check_tokenizer("messages");
    check(tokenizer_->end_of_turn_id() >= 0, "messages: expected a vocabulary with <end_of_turn>");
    const auto messages = this->messages();
    auto speaker = messages.begin() + (messages[0].role == "system" ? 1 : 0);
    Example example;
    bool closes_reply = false;  // true where the frame begins with the <end_of_turn> of a reply
    for (const auto& part : chat_parts(messages, /*add_generation_prompt=*/false)) {
      const auto ids = checked(encode_parts(*tokenizer_, {part}), "messages");
      const auto before = example.ids.size();
      const bool is_reply = !part.frame && is_assistant(*speaker++);
      append(example, ids, is_reply);
      if (is_reply) {
        const auto header = header_size(part.text, ids);
        std::fill_n(example.is_target.begin() + static_cast<int64_t>(before), header, false);
      } else if (closes_reply) {
        example.is_target[before] = true;
      }
      closes_reply = is_reply;
    }
    return example;
  }

 private:
  static bool is_assistant(const ChatMessage& message) {
    return message.role == "assistant" || message.role == "model";
  }

  void check_tokenizer(const char* name) const {
    check(
        tokenizer_ != nullptr, "{}: expected ids, there is no tokenizer to encode text with", name);
    check(tokenizer_->bos_id() >= 0 && tokenizer_->eos_id() >= 0,
          "{}: expected a vocabulary with <bos> and <eos>",
          name);
  }

  std::vector<int64_t> checked(std::vector<int64_t> ids, const char* name) const {
    for (const auto id : ids) {
      check(id < vocab_size_, "{}: expected token ids below {}, got {}", name, vocab_size_, id);
    }
    return ids;
  }

  std::vector<int64_t> encode(const char* name, bool add_bos) const {
    const auto& text = text_of(json_, name, name);
    check_tokenizer(name);
    check(!add_bos || !text.starts_with(tokenizer_->piece(tokenizer_->bos_id())),
          "{}: expected a text without <bos>, which is added, got one that begins with it",
          name);
    return checked(tokenizer_->encode(text, {.add_bos = add_bos}), name);
  }

  std::vector<int64_t> ids_of(const char* name) const {
    const auto& list = json_.at(name);
    if (!list.is_array() || list.empty()) {
      fail(
          "{}: expected a list of token ids, got {}", name, list.is_array() ? "none" : shown(list));
    }
    std::vector<int64_t> ids;
    ids.reserve(list.size());
    for (const auto& value : list) {
      const bool fits =
          value.is_number_unsigned() && value.get<uint64_t>() < static_cast<uint64_t>(vocab_size_);
      if (!fits) {
        fail("{}[{}]: expected an id from 0 to {}, got {}",
             name,
             ids.size(),
             vocab_size_ - 1,
             shown(value));
      }
      ids.push_back(value.get<int64_t>());
    }
    return ids;
  }

  std::vector<ChatMessage> messages() const {
    const auto& list = json_.at("messages");
    if (!list.is_array() || list.empty()) {
      fail("messages: expected a list of messages, got {}", list.is_array() ? "none" : shown(list));
    }
    std::vector<ChatMessage> messages;
    for (const auto& value : list) {
      const auto where = fmt::format("messages[{}]", messages.size());
      if (!value.is_object()) {
        fail("{}: expected an object with role and content, got {}", where, shown(value));
      }
      for (const auto& [name, of] : value.items()) {
        check(name == "role" || name == "content",
              "{}: expected role and content only, got \"{}\" too",
              where,
              printable(name));
      }
      messages.push_back(
          {text_of(value, "role", where + ".role"), text_of(value, "content", where + ".content")});
      check(!strip(messages.back().content).empty(),
            "{}.content: expected some text, got white space",
            where);
    }
    check(is_assistant(messages.back()),
          "messages: expected the last to be the assistant's, got one of {}",
          printable(messages.back().role));
    return messages;
  }

  // Tokens of "model\n", with which every reply begins in the prompt of `gemma chat` too.
  int64_t header_size(const std::string& text, const std::vector<int64_t>& ids) const {
    const auto header = encode_parts(*tokenizer_, {{text.substr(0, text.find('\n') + 1)}});
    check(header.size() < ids.size() && std::equal(header.begin(), header.end(), ids.begin()),
          "messages: expected a vocabulary that joins no newline with what follows");
    return static_cast<int64_t>(header.size());
  }

  const Json& json_;
  const Tokenizer* tokenizer_;
  int64_t vocab_size_;
};

struct Kind {
  std::vector<std::string> fields;  // sorted, as those of a parsed object are
  Example (LineReader::*read)() const;
};

const std::array<Kind, 5> kByFields = {{
    {{"text"}, &LineReader::text},
    {{"completion", "prompt"}, &LineReader::pair},
    {{"messages"}, &LineReader::chat},
    {{"ids"}, &LineReader::ids},
    {{"completion_ids", "prompt_ids"}, &LineReader::id_pair},
}};

const Kind& kind_of(const Json& json) {
  if (!json.is_object()) {
    fail("expected a JSON object, got {}. Hint: one object a line, no list around them",
         shown(json));
  }
  std::vector<std::string> names;
  for (const auto& [name, value] : json.items()) {
    if (name != "meta") {
      names.push_back(name);
    }
  }
  for (const auto& name : names) {
    const bool known = std::any_of(kByFields.begin(), kByFields.end(), [&](const Kind& kind) {
      return std::find(kind.fields.begin(), kind.fields.end(), name) != kind.fields.end();
    });
    check(known, "\"{}\": expected only {}, and meta", printable(name), kKinds);
  }
  for (const auto& kind : kByFields) {
    if (kind.fields == names) {
      return kind;
    }
  }
  fail("fields: expected {}, got {}",
       kKinds,
       names.empty() ? "none" : fmt::to_string(fmt::join(names, ", ")));
}

Json parse_line(std::string_view line) {
  check(!line.starts_with("\xEF\xBB\xBF"), "expected no byte order mark, got one");
  const auto valid = valid_utf8_prefix(line);
  check(valid == line.size(),
        "expected UTF-8, got byte {:#04x} at byte {} of the line",
        valid < line.size() ? static_cast<unsigned char>(line[valid]) : 0,
        valid);
  const auto nul = line.find('\0');  // which the parser would take for the end
  check(nul == std::string_view::npos, "expected text, got a NUL at byte {} of the line", nul);
  return parse_strict_json(line, kDepth, "counted in this line");
}

Example read(std::string_view line, const Tokenizer* tokenizer, const ExampleOptions& options) {
  const auto json = parse_line(line);
  const auto& kind = kind_of(json);
  auto example = (LineReader(json, tokenizer, options.vocab_size).*kind.read)();
  if (options.all_tokens) {
    example.is_target.assign(example.ids.size(), true);
  }
  example.is_target[0] = false;  // nothing comes before it
  const auto most = static_cast<size_t>(options.max_tokens);
  if (example.ids.size() > most) {
    example.ids.resize(most);
    example.is_target.resize(most);
    example.truncated = true;
  }
  return example;
}

}  // namespace

Example parse_example(std::string_view line,
                      const std::string& place,
                      const Tokenizer* tokenizer,
                      const ExampleOptions& options) {
  try {
    return read(line, tokenizer, options);
  } catch (const Error& error) {
    std::string_view what = error.what();
    if (what.starts_with('[')) {  // the operation of a reader below, which the user did not ask for
      what.remove_prefix(what.find(' ') + 1);
    }
    fail("[training_data] {}: {}", place, what);
  }
}

}  // namespace gemma_torch
