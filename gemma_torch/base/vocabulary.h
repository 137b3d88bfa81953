#pragma once

#include <string>
#include <vector>

namespace gemma_torch {

/// What a piece is to sentencepiece; the numbers are those of its ModelProto.
enum class PieceType {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6
};

struct Piece {
  std::string text = {};  // UTF-8, a space written as U+2581
  float score = 0.0F;     // higher merges first
  PieceType type = PieceType::kNormal;
};

/// The pieces of a tokenizer in id order, wherever they were read (tokenizer.model, tokenizer.json, GGUF).
struct Vocabulary {
  std::vector<Piece> pieces = {};
};

}  // namespace gemma_torch
