#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "common.h"

namespace gemma_torch::apps {

/// Where the prompts of a command come from that takes one or many.
struct PromptOptions {
  TextOptions text = {};
  std::optional<std::string> lines = {};  // a file with a prompt in each line
  std::optional<std::string> jsonl = {};

  bool many() const { return lines || jsonl; }
};

void add_prompt_flags(CLI::App& command, PromptOptions& options);

/// The token ids of each prompt.
/// Throws: Error naming file and line of what is no prompt, for two sources, and as read_ids.
std::vector<std::vector<int64_t>> read_prompts(const PromptOptions& options,
                                               const std::optional<Tokenizer>& tokenizer);

/// The token ids of a JSON value: a text, or a list of ids.
/// Throws: Error naming `where` for anything else, or for a text where there is no tokenizer.
std::vector<int64_t> prompt_of(const nlohmann::json& value,
                               const std::optional<Tokenizer>& tokenizer,
                               const std::string& where);

/// The lines of a file, each with the place that messages name ("FILE line 3"); \r before \n goes.
/// Throws: Error for an empty line or file, naming it and what it lacks.
struct Line {
  std::string text = {};
  std::string where = {};
};
std::vector<Line> read_lines(const std::string& path, const std::string& what);

/// A JSON list of integers. Throws: Error naming the place.
std::vector<int64_t> ids_from_json(const nlohmann::json& list, const std::string& where);

/// Tokens that a command is about.
struct TokenOptions {
  std::optional<std::string> texts = {};  // " Paris, Rome": one token each
  std::optional<std::string> ids = {};
  std::string flag = "--tokens";  // what they are called on the command line
  std::string ids_flag = "--token-ids";

  bool given() const { return texts || ids; }
};

void add_token_flags(CLI::App& command,
                     TokenOptions& options,
                     const std::string& help =
                         "' Paris, Rome': one token or two, of which the logit or its difference "
                         "is shown; the space belongs to the token");

/// Their ids; none where the flags were not given.
/// Throws: Error naming a text that is not one token, and as parse_ids.
std::vector<int64_t> read_tokens(const TokenOptions& options,
                                 const std::optional<Tokenizer>& tokenizer);

}  // namespace gemma_torch::apps
