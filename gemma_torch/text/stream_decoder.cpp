#include "gemma_torch/text/stream_decoder.h"

#include <utility>

#include "gemma_torch/text/tokenizer.h"
#include "gemma_torch/text/utf8.h"
#include "gemma_torch/text/vocabulary_rules.h"

namespace gemma_torch {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

void append_with_spaces(std::string& text, std::string_view piece) {
  for (size_t mark = piece.find(kSpaceMark); mark != std::string_view::npos;
       mark = piece.find(kSpaceMark)) {
    text.append(piece.substr(0, mark)).push_back(' ');
    piece.remove_prefix(mark + kSpaceMark.size());
  }
  text.append(piece);
}

}  // namespace

std::string StreamDecoder::push(int64_t id) {
  if (const int byte = tokenizer_.byte_value(id); byte >= 0) {
    bytes_.push_back(static_cast<char>(byte));
    return {};
  }
  if (skip_special_ && tokenizer_.is_special(id)) {
    return {};  // as if it were not there: a byte run goes on across it
  }
  std::string text = flush();
  append_with_spaces(text, tokenizer_.piece(id));
  return text;
}

std::string StreamDecoder::flush() {
  std::string run = std::exchange(bytes_, {});
  if (is_utf8(run)) {
    return run;
  }
  std::string text;
  for (size_t i = 0; i < run.size(); ++i) {
    text += kReplacement;
  }
  return text;
}

}  // namespace gemma_torch
