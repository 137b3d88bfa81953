#include "gemma_torch/text/vocabulary_rules.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "gemma_torch/base/error.h"
#include "gemma_torch/text/utf8.h"

namespace gemma_torch {
namespace {

void spaces_to_marks(std::string& text) {
  for (size_t at = text.find(' '); at != std::string::npos; at = text.find(' ', at)) {
    text.replace(at, 1, kSpaceMark);
    at += kSpaceMark.size();
  }
}

bool is_unused_piece(std::string_view text) {
  constexpr std::string_view kHead = "<unused";
  if (!text.starts_with(kHead) || !text.ends_with('>') || text.size() == kHead.size() + 1) {
    return false;
  }
  const auto digits = text.substr(kHead.size(), text.size() - kHead.size() - 1);
  return std::all_of(digits.begin(), digits.end(), [](char c) { return c >= '0' && c <= '9'; });
}

PieceType type_by_rule(const Piece& piece) {
  if (piece.text == "<unk>") {
    return PieceType::kUnknown;
  }
  if (is_special_piece(piece.text)) {
    return PieceType::kControl;
  }
  return is_unused_piece(piece.text) ? PieceType::kUserDefined : piece.type;
}

int hex_digit(char c) {
  return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

void check_piece(const Piece& piece, size_t id) {
  check(!piece.text.empty(), "[vocabulary] piece {} is empty", id);
  check(is_utf8(piece.text), "[vocabulary] piece {} is not UTF-8", id);
  check(std::isfinite(piece.score), "[vocabulary] piece {}: its score is not finite", id);
  // sentencepiece finds user-defined pieces with a trie over C strings
  check(piece.type != PieceType::kUserDefined || piece.text.find('\0') == std::string::npos,
        "[vocabulary] piece {} is user-defined and holds a NUL",
        id);
  check(piece.type != PieceType::kByte || byte_of_piece(piece.text) >= 0,
        "[vocabulary] piece {}: expected a byte as <0x00> .. <0xFF>, got {:?}",
        id,
        std::string_view(piece.text).substr(0, 40));
}

}  // namespace

bool is_special_piece(std::string_view text) {
  return std::find(kSpecialPieces.begin(), kSpecialPieces.end(), text) != kSpecialPieces.end();
}

int byte_of_piece(std::string_view text) {
  if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>') {
    return -1;
  }
  const int high = hex_digit(text[3]);
  const int low = hex_digit(text[4]);
  return high < 0 || low < 0 ? -1 : high * 16 + low;
}

Vocabulary normalize_gguf_vocabulary(Vocabulary vocabulary) {
  bool images = false;
  bool soft_token = false;
  for (Piece& piece : vocabulary.pieces) {
    spaces_to_marks(piece.text);
    piece.type = type_by_rule(piece);
    if (piece.type != PieceType::kNormal) {
      piece.score = 0.0F;
    }
    images = images || piece.text == "<end_of_image>";
    soft_token = soft_token || piece.text == "<image_soft_token>";
  }
  if (images && !soft_token) {
    vocabulary.pieces.push_back({.text = "<image_soft_token>", .type = PieceType::kControl});
  }
  return vocabulary;
}

void check_vocabulary(const Vocabulary& vocabulary) {
  check(vocabulary.pieces.size() < (size_t{1} << 30),
        "[vocabulary] {} pieces",
        vocabulary.pieces.size());
  size_t unknowns = 0;
  std::array<bool, 256> seen = {};
  size_t bytes = 0;
  for (size_t id = 0; id < vocabulary.pieces.size(); ++id) {
    const Piece& piece = vocabulary.pieces[id];
    check_piece(piece, id);
    unknowns += piece.type == PieceType::kUnknown ? 1 : 0;
    if (piece.type == PieceType::kByte) {
      bool& known = seen[static_cast<size_t>(byte_of_piece(piece.text))];
      check(!known, "[vocabulary] piece {}: {} is given twice", id, piece.text);
      known = true;
      ++bytes;
    }
  }
  check(unknowns == 1, "[vocabulary] expected one piece of type UNKNOWN, got {}", unknowns);
  check(bytes == 0 || bytes == 256, "[vocabulary] expected 256 byte pieces or none, got {}", bytes);
}

}  // namespace gemma_torch
