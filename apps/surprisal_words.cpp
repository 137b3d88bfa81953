#include "surprisal_words.h"

#include <string_view>

namespace gemma_torch::apps {
namespace {

constexpr std::string_view kWhite = " \t\n\r\v\f";

std::string without_white(const std::string& text) {
  const auto begin = text.find_first_not_of(kWhite);
  return begin == std::string::npos ? ""
                                    : text.substr(begin, text.find_last_not_of(kWhite) + 1 - begin);
}

bool is_white(char c) {
  return kWhite.find(c) != std::string_view::npos;
}

// What ends the text without a letter is no word.
void join_last(std::vector<WordSurprisal>& words) {
  if (words.size() < 2 || !words.back().text.empty()) {
    return;
  }
  const auto last = words.back();
  words.pop_back();
  words.back().bits += last.bits;
  words.back().tokens += last.tokens;
}

}  // namespace

std::vector<WordSurprisal> word_surprisals(const std::vector<TokenSurprisal>& scores,
                                           const Tokenizer& tokenizer) {
  std::vector<WordSurprisal> words;
  std::vector<int64_t> ids;  // of the word that is being read
  bool has_letters = false, ended = false;
  for (const auto& at : scores) {
    const auto text = tokenizer.decode({at.score.id});
    if (words.empty() || (has_letters && (ended || (!text.empty() && is_white(text.front()))))) {
      words.push_back({.first = at.score.index});
      ids.clear();
      has_letters = ended = false;
    }
    auto& word = words.back();
    ids.push_back(at.score.id);
    word.bits += at.bits;
    ++word.tokens;
    word.text = without_white(tokenizer.decode(ids));
    has_letters = !word.text.empty();
    ended = has_letters && !text.empty() && is_white(text.back());
  }
  join_last(words);
  return words;
}

}  // namespace gemma_torch::apps
