#include "encode_pair.h"

#include <algorithm>

#include "gemma_torch/base/error.h"
#include "gemma_torch/io/file_bytes.h"

namespace gemma_torch::apps {
namespace {

// What str.isspace of Python is true for.
constexpr std::string_view kSpaces[] = {"\t",     "\n",     "\v",     "\f",     "\r",     "\x1c",
                                        "\x1d",   "\x1e",   "\x1f",   " ",      "\u0085", "\u00a0",
                                        "\u1680", "\u2000", "\u2001", "\u2002", "\u2003", "\u2004",
                                        "\u2005", "\u2006", "\u2007", "\u2008", "\u2009", "\u200a",
                                        "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"};

// <bos> first, unless the text spells it out itself.
std::vector<int64_t> encode(const std::string& text, const Tokenizer& tokenizer) {
  const bool has_bos = text.starts_with(tokenizer.piece(tokenizer.bos_id()));
  return tokenizer.encode(text, {.add_bos = !has_bos});
}

TokenPair split(std::vector<int64_t> whole, std::vector<int64_t> context) {
  const auto cut = static_cast<int64_t>(std::min(whole.size(), context.size()));
  whole.erase(whole.begin(), whole.begin() + cut);
  return {std::move(context), std::move(whole)};
}

}  // namespace

size_t length_without_trailing_space(std::string_view text) {
  for (bool found = true; found;) {
    found = false;
    for (const auto space : kSpaces) {
      if (text.ends_with(space)) {
        text.remove_suffix(space.size());
        found = true;
      }
    }
  }
  return text.size();
}

int64_t count_characters(std::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char byte) {
    return (static_cast<unsigned char>(byte) & 0xC0U) != 0x80U;  // not inside one
  });
}

TokenPair encode_pair(const std::string& context,
                      const std::string& continuation,
                      const Tokenizer& tokenizer) {
  TokenPair pair;
  if (context.empty()) {
    pair = split(encode(continuation, tokenizer), {tokenizer.bos_id()});
  } else {
    const auto kept = context.substr(0, length_without_trailing_space(context));
    pair = split(encode(context + continuation, tokenizer), encode(kept, tokenizer));
  }
  check(!pair.continuation.empty(),
        "[score] continuation: expected at least one token of its own, got \"{}\"",
        printable(continuation));
  return pair;
}

CutText cut_text(const std::string& text, int64_t most, const Tokenizer& tokenizer) {
  auto ids = tokenizer.encode(text, {.add_bos = false});
  const auto all = static_cast<int64_t>(ids.size());
  if (all <= most) {
    return {text, 0};
  }
  // A run of bytes that would be cut may be half a character: all of it goes.
  const auto is_byte = [&](int64_t i) {
    return tokenizer.byte_value(ids[static_cast<size_t>(i)]) >= 0;
  };
  auto kept = most;
  while (kept > 0 && is_byte(kept) && is_byte(kept - 1)) {
    --kept;
  }
  ids.resize(static_cast<size_t>(kept));
  return {tokenizer.decode(ids), all - kept};
}

}  // namespace gemma_torch::apps
