#include "token_labels.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <string_view>

namespace gemma_torch::apps {
namespace {

constexpr std::string_view kSpace = "\u2581";  // a piece's

void replace_all(std::string& text, std::string_view what, std::string_view with) {
  for (size_t at = 0; (at = text.find(what, at)) != std::string::npos; at += with.size()) {
    text.replace(at, what.size(), with);
  }
}

}  // namespace

std::string token_label(int64_t id, const std::optional<Tokenizer>& tokenizer) {
  if (!tokenizer) {
    return std::to_string(id);
  }
  auto piece = tokenizer->piece(id);
  replace_all(piece, kSpace, "\u00b7");
  replace_all(piece, "\n", "\u21b5");
  return piece;
}

std::vector<std::string> token_labels(const std::vector<int64_t>& ids,
                                      const std::optional<Tokenizer>& tokenizer) {
  std::vector<std::string> labels;
  for (const auto id : ids) {
    labels.push_back(token_label(id, tokenizer));
  }
  return labels;
}

std::string difference_label(const std::vector<int64_t>& tokens,
                             const std::optional<Tokenizer>& tokenizer) {
  const auto first = token_label(tokens[0], tokenizer);
  return tokens.size() < 2 ? first : first + " \u2212 " + token_label(tokens[1], tokenizer);
}

std::string token_text(int64_t id, const std::optional<Tokenizer>& tokenizer) {
  if (!tokenizer) {
    return " " + std::to_string(id);
  }
  auto piece = tokenizer->piece(id);
  replace_all(piece, kSpace, " ");
  return piece;
}

std::string prompt_text(const std::vector<int64_t>& ids,
                        const std::optional<Tokenizer>& tokenizer) {
  return tokenizer ? tokenizer->decode(ids) : fmt::format("{}", fmt::join(ids, ","));
}

std::vector<std::string> indices(int64_t n) {
  std::vector<std::string> names;
  for (int64_t i = 0; i < n; ++i) {
    names.push_back(std::to_string(i));
  }
  return names;
}

}  // namespace gemma_torch::apps
