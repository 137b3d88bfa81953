#include "prompts.h"

#include <algorithm>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/io/file_bytes.h"
#include "gemma_torch/io/strict_json.h"

namespace gemma_torch::apps {
namespace {

constexpr int kJsonDepth = 16;  // a prompt's own is 2; what else a record holds is free

std::vector<int64_t> encode(const std::string& text,
                            const std::optional<Tokenizer>& tokenizer,
                            const std::string& where) {
  check(tokenizer.has_value(),
        "[prompts] {}: expected ids, this model has no tokenizer. Hint: --prompts-jsonl, lines "
        "such as {{\"ids\": [2, 818]}}",
        where);
  return tokenizer->encode(text);
}

std::vector<int64_t> from_json(const std::string& line,
                               const std::optional<Tokenizer>& tokenizer,
                               const std::string& where) {
  const auto record = parse_strict_json(line, kJsonDepth, where);
  const bool object = record.is_object();
  const bool ids = object && record.contains("ids") && record["ids"].is_array();
  const bool text = object && record.contains("prompt") && record["prompt"].is_string();
  check(record.is_string() || record.is_array() || ids != text,
        "[prompts] {}: expected a string, a list of ids, or an object with \"prompt\" or \"ids\", "
        "got {}",
        where,
        printable(line.substr(0, 60)));
  return prompt_of(ids ? record["ids"] : text ? record["prompt"] : record, tokenizer, where);
}

}  // namespace

std::vector<int64_t> prompt_of(const nlohmann::json& value,
                               const std::optional<Tokenizer>& tokenizer,
                               const std::string& where) {
  if (value.is_string()) {
    return encode(value.get<std::string>(), tokenizer, where);
  }
  check(value.is_array(),
        "[prompts] {}: expected a text or a list of token ids, got {}",
        where,
        printable(value.dump()));
  return ids_from_json(value, where);
}

std::vector<int64_t> ids_from_json(const nlohmann::json& list, const std::string& where) {
  std::vector<int64_t> ids;
  for (const auto& id : list) {
    check(id.is_number_integer(),
          "[prompts] {}: expected a list of token ids, got {}",
          where,
          printable(id.dump()));
    ids.push_back(id.get<int64_t>());
  }
  return ids;
}

std::vector<Line> read_lines(const std::string& path, const std::string& what) {
  const auto content = read_file(path);
  std::vector<Line> lines;
  for (size_t start = 0; start < content.size();) {
    const auto end = std::min(content.find('\n', start), content.size());
    auto text = content.substr(start, end - start);
    start = end + 1;
    if (text.ends_with('\r')) {
      text.pop_back();
    }
    const auto where = fmt::format("{} line {}", path, lines.size() + 1);
    check(!text.empty(), "[prompts] {}: expected {}, got an empty line", where, what);
    lines.push_back({std::move(text), where});
  }
  check(!lines.empty(), "[prompts] {}: expected {} in each line, got an empty file", path, what);
  return lines;
}

void add_prompt_flags(CLI::App& command, PromptOptions& options) {
  add_text_flags(command, options.text);
  command.add_option("--prompts", options.lines, "file with a prompt in each line");
  command.add_option(
      "--prompts-jsonl",
      options.jsonl,
      "file with a JSON value in each line: a string, a list of ids, {\"prompt\": ..} or {\"ids\": "
      "..}");
}

std::vector<std::vector<int64_t>> read_prompts(const PromptOptions& options,
                                               const std::optional<Tokenizer>& tokenizer) {
  if (!options.many()) {
    return {read_ids(options.text, tokenizer)};
  }
  const auto& text = options.text;
  const int given = !!text.prompt + !!text.file + !!text.ids + !!options.lines + !!options.jsonl;
  check(given == 1,
        "[prompts] expected one of -p, -f, --ids, --prompts and --prompts-jsonl, got {}",
        given);
  const auto& path = options.lines ? *options.lines : *options.jsonl;
  std::vector<std::vector<int64_t>> prompts;
  for (const auto& [line, where] : read_lines(path, "a prompt")) {
    prompts.push_back(options.lines ? encode(line, tokenizer, where)
                                    : from_json(line, tokenizer, where));
  }
  return prompts;
}

void add_token_flags(CLI::App& command, TokenOptions& options, const std::string& help) {
  command.add_option_function<std::string>(
      options.flag, [&options](const std::string& value) { options.texts = value; }, help);
  command.add_option_function<std::string>(
      options.ids_flag,
      [&options](const std::string& value) { options.ids = value; },
      "the same by id: 9079,22138");
}

std::vector<int64_t> read_tokens(const TokenOptions& options,
                                 const std::optional<Tokenizer>& tokenizer) {
  check(!options.texts || !options.ids,
        "[tokens] expected {} or {}, got both",
        options.flag,
        options.ids_flag);
  if (options.ids) {
    return parse_ids(*options.ids);
  }
  std::vector<int64_t> tokens;
  for (size_t start = 0; options.texts && start <= options.texts->size();) {
    check(tokenizer.has_value(),
          "[tokens] this model has no tokenizer. Hint: {} 9079,22138",
          options.ids_flag);
    const auto end = std::min(options.texts->find(',', start), options.texts->size());
    const auto text = options.texts->substr(start, end - start);
    const auto ids = tokenizer->encode(text, {.add_bos = false});
    check(ids.size() == 1,
          "[tokens] \"{}\": expected one token, got {}. Hint: with the space before it, or {}",
          printable(text),
          ids.size(),
          options.ids_flag);
    tokens.push_back(ids[0]);
    start = end + 1;
  }
  return tokens;
}

}  // namespace gemma_torch::apps
