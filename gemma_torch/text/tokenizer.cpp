#include "gemma_torch/text/tokenizer.h"

#include <sentencepiece_processor.h>

#include <algorithm>
#include <exception>
#include <utility>

#include "gemma_torch/base/error.h"
#include "gemma_torch/text/model_proto.h"
#include "gemma_torch/text/stream_decoder.h"
#include "gemma_torch/text/utf8.h"
#include "gemma_torch/text/vocabulary_rules.h"

namespace gemma_torch {
namespace {

// sentencepiece counts bytes and symbols in int.
constexpr size_t kLongestText = size_t{1} << 30;

std::shared_ptr<const sentencepiece::SentencePieceProcessor> load(const Vocabulary& vocabulary) {
  auto processor = std::make_shared<sentencepiece::SentencePieceProcessor>();
  const std::string model = serialize_normalized(vocabulary);
  std::string reason;
  try {
    const auto status = processor->LoadFromSerializedProto(model);
    reason = status.ok() ? "" : status.ToString();
  } catch (const std::exception& error) {  // its trie throws on keys that it cannot hold
    reason = error.what();
  }
  check(reason.empty(), "[tokenizer] sentencepiece refuses the vocabulary: {}", reason);
  return processor;
}

}  // namespace

Tokenizer::Tokenizer(Vocabulary vocabulary) {
  Vocabulary normal = normalize_gguf_vocabulary(std::move(vocabulary));
  processor_ = load(normal);
  pieces_ = std::move(normal.pieces);
  find_specials();
  find_space_runs();
  find_newline_rule();
}

void Tokenizer::find_specials() {
  is_special_.assign(pieces_.size(), false);
  for (const std::string_view text : kSpecialPieces) {
    if (const int64_t id = id_of(text); id >= 0) {
      special_ids_.push_back(id);
      is_special_[static_cast<size_t>(id)] = true;
    }
  }
}

void Tokenizer::find_space_runs() {
  space_run_ids_.fill(-1);
  std::string run(kSpaceMark);
  for (size_t n = 2; n < space_run_ids_.size(); ++n) {
    run += kSpaceMark;
    const int64_t id = id_of(run);
    space_run_ids_[n] = id >= 0 && at(id).type == PieceType::kUserDefined ? id : -1;
  }
}

// True if no piece spans a newline and something else, and newlines never merge: then cutting the
// text after a run of newlines changes no id, and short spans are cut about twice as fast as one
// long one.
void Tokenizer::find_newline_rule() {
  const int64_t newline = id_of("\n");
  newlines_stand_alone_ = newline >= 0 && at(newline).type == PieceType::kUserDefined &&
                          std::all_of(pieces_.begin(), pieces_.end(), [](const Piece& piece) {
                            return piece.text.find('\n') == std::string::npos ||
                                   piece.text.find_first_not_of('\n') == std::string::npos;
                          });
}

size_t Tokenizer::index(int64_t id) const {
  check(id >= 0 && id < size(), "[tokenizer] id: expected 0 .. {}, got {}", size() - 1, id);
  return static_cast<size_t>(id);
}

int64_t Tokenizer::id_of(std::string_view piece) const {
  const int id = processor_->PieceToId(piece);
  // sentencepiece answers with the unknown piece's id for what it does not know
  return pieces_[static_cast<size_t>(id)].text == piece ? id : -1;
}

int Tokenizer::byte_value(int64_t id) const {
  const Piece& piece = at(id);
  return piece.type == PieceType::kByte ? byte_of_piece(piece.text) : -1;
}

std::vector<int64_t> Tokenizer::stop_ids() const {
  return eos_id() >= 0 ? std::vector<int64_t>{eos_id()} : std::vector<int64_t>{};
}

Tokenizer::Match Tokenizer::special_at(std::string_view text, bool parse_special) const {
  if (text[0] == '<') {
    for (size_t i = 0; parse_special && i < special_ids_.size(); ++i) {
      const std::string& piece = pieces_[static_cast<size_t>(special_ids_[i])].text;
      if (text.starts_with(piece)) {
        return {special_ids_[i], piece.size()};
      }
    }
    return {};
  }
  size_t run = 0;
  Match longest;
  while (run + 1 < space_run_ids_.size() &&
         text.substr(run * kSpaceMark.size()).starts_with(kSpaceMark)) {
    ++run;
    if (run >= 2 && space_run_ids_[run] >= 0) {
      longest = {space_run_ids_[run], run * kSpaceMark.size()};
    }
  }
  return longest;
}

std::vector<int64_t> Tokenizer::encode(std::string_view text, EncodeOptions options) const {
  const size_t valid = valid_utf8_prefix(text);
  check(valid == text.size(),
        "[encode] text is not UTF-8: byte {:#04x} at offset {} of {}",
        valid < text.size() ? static_cast<unsigned char>(text[valid]) : 0,
        valid,
        text.size());
  check(text.size() <= kLongestText,
        "[encode] text of {} bytes, at most {}",
        text.size(),
        kLongestText);
  std::vector<int64_t> ids;
  if (options.add_bos) {
    check(bos_id() >= 0, "[encode] the vocabulary has no <bos>. Hint: add_bos = false");
    ids.push_back(bos_id());
  }
  // Hugging Face finds these in the text as written, before spaces turn into U+2581; sentencepiece
  // would take a literal U+2581 and a space for the same thing.
  size_t begin = 0;
  size_t at = 0;
  while ((at = text.find_first_of("<\xE2", at)) != std::string_view::npos) {
    const Match match = special_at(text.substr(at), options.parse_special);
    if (match.bytes == 0) {
      ++at;
      continue;
    }
    encode_plain(text.substr(begin, at - begin), ids);
    ids.push_back(match.id);
    at += match.bytes;
    begin = at;
  }
  encode_plain(text.substr(begin), ids);
  return ids;
}

void Tokenizer::encode_plain(std::string_view text, std::vector<int64_t>& ids) const {
  while (!text.empty()) {
    size_t end = newlines_stand_alone_ ? text.find('\n') : text.size();
    end = text.find_first_not_of('\n', std::min(end, text.size()));
    encode_span(text.substr(0, end), ids);
    text.remove_prefix(std::min(end, text.size()));
  }
}

void Tokenizer::encode_span(std::string_view text, std::vector<int64_t>& ids) const {
  std::vector<int> cut;
  const auto status = processor_->Encode(text, &cut);
  check(status.ok(), "[encode] sentencepiece: {}", status.ToString());
  ids.insert(ids.end(), cut.begin(), cut.end());
}

std::string Tokenizer::decode(const std::vector<int64_t>& ids, bool skip_special) const {
  StreamDecoder decoder(*this, skip_special);
  std::string text;
  for (const int64_t id : ids) {
    text += decoder.push(id);
  }
  return text += decoder.flush();
}

}  // namespace gemma_torch
