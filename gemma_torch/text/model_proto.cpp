#include "gemma_torch/text/model_proto.h"

#include <algorithm>
#include <cstdint>
#include <optional>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/text/proto_wire.h"
#include "gemma_torch/text/vocabulary_rules.h"

namespace gemma_torch {
namespace {

// field numbers of sentencepiece_model.proto
namespace model {
constexpr uint32_t kPieces = 1, kTrainerSpec = 2, kNormalizerSpec = 3;
}
namespace piece_field {
constexpr uint32_t kText = 1, kScore = 2, kType = 3;
}
namespace trainer {
constexpr uint32_t kModelType = 3, kVocabSize = 4, kByteFallback = 35;
constexpr uint32_t kUnkId = 40, kBosId = 41, kEosId = 42, kPadId = 43;
constexpr uint32_t kUnkSurface = 44, kUnkPiece = 45, kBosPiece = 46, kEosPiece = 47, kPadPiece = 48;
constexpr uint64_t kBpe = 2;
}  // namespace trainer
namespace normalizer {
constexpr uint32_t kName = 1, kCharacterMap = 2, kAddDummyPrefix = 3, kRemoveExtraSpaces = 4;
constexpr uint32_t kEscapeSpaces = 5;
}  // namespace normalizer

constexpr size_t kLargestFile = size_t{256} << 20;  // Gemma's has 4.7 MB

Piece parse_piece(std::string_view message) {
  Piece piece;
  ProtoReader reader(message);
  for (ProtoField field; reader.next(field);) {
    switch (field.number) {
      case piece_field::kText:
        piece.text = field.as_bytes();
        break;
      case piece_field::kScore:
        piece.score = field.as_float32();
        break;
      case piece_field::kType: {
        const uint64_t type = field.as_varint();
        check(type >= 1 && type <= 6, "[protobuf] piece type: expected 1 .. 6, got {}", type);
        piece.type = static_cast<PieceType>(type);
        break;
      }
      default:
        break;
    }
  }
  return piece;
}

void check_trainer_spec(std::string_view message) {
  uint64_t model_type = 1;  // the proto's default, unigram
  ProtoReader reader(message);
  for (ProtoField field; reader.next(field);) {
    if (field.number == trainer::kModelType) {
      model_type = field.as_varint();
    }
  }
  check(model_type == trainer::kBpe,
        "[protobuf] trainer_spec.model_type: expected {} (BPE), got {}",
        trainer::kBpe,
        model_type);
}

void check_normalizer_spec(std::string_view message) {
  bool dummy_prefix = true;  // true is what the proto takes for absent flags
  bool removes_spaces = true;
  bool escapes_spaces = true;
  size_t map_size = 0;
  ProtoReader reader(message);
  for (ProtoField field; reader.next(field);) {
    switch (field.number) {
      case normalizer::kCharacterMap:
        map_size = field.as_bytes().size();
        break;
      case normalizer::kAddDummyPrefix:
        dummy_prefix = field.as_varint() != 0;
        break;
      case normalizer::kRemoveExtraSpaces:
        removes_spaces = field.as_varint() != 0;
        break;
      case normalizer::kEscapeSpaces:
        escapes_spaces = field.as_varint() != 0;
        break;
      default:
        break;
    }
  }
  check(!dummy_prefix && !removes_spaces && escapes_spaces && map_size == 0,
        "[protobuf] normalizer_spec: expected Gemma's (add_dummy_prefix 0, "
        "remove_extra_whitespaces 0, "
        "escape_whitespaces 1, no character map), got {:d}, {:d}, {:d}, a map of {} bytes",
        dummy_prefix,
        removes_spaces,
        escapes_spaces,
        map_size);
}

Vocabulary parse_model(std::string_view bytes) {
  Vocabulary vocabulary;
  std::string_view trainer_spec;
  std::string_view normalizer_spec;
  ProtoReader reader(bytes);
  for (ProtoField field; reader.next(field);) {
    switch (field.number) {
      case model::kPieces:
        vocabulary.pieces.push_back(parse_piece(field.as_bytes()));
        break;
      case model::kTrainerSpec:
        trainer_spec = field.as_bytes();
        break;
      case model::kNormalizerSpec:
        normalizer_spec = field.as_bytes();
        break;
      default:
        break;
    }
  }
  check_trainer_spec(trainer_spec);
  check_normalizer_spec(normalizer_spec);
  vocabulary = normalize_gguf_vocabulary(std::move(vocabulary));
  check_vocabulary(vocabulary);
  return vocabulary;
}

void serialize_piece(const Piece& piece, ProtoWriter& writer) {
  writer.bytes(piece_field::kText, piece.text);
  writer.float32(piece_field::kScore, piece.score);
  writer.varint(piece_field::kType, static_cast<uint64_t>(piece.type));
}

// -1, which says "has none", is written as protobuf writes negative numbers: as 64 bits.
uint64_t id_or_none(const Vocabulary& vocabulary, std::string_view text) {
  const auto& pieces = vocabulary.pieces;
  const auto found =
      std::find_if(pieces.begin(), pieces.end(), [&](const Piece& p) { return p.text == text; });
  return found == pieces.end() ? ~uint64_t{0} : static_cast<uint64_t>(found - pieces.begin());
}

std::string serialize_trainer_spec(const Vocabulary& vocabulary) {
  const auto& pieces = vocabulary.pieces;
  const auto unknown = std::find_if(
      pieces.begin(), pieces.end(), [](const Piece& p) { return p.type == PieceType::kUnknown; });
  const bool bytes = std::any_of(
      pieces.begin(), pieces.end(), [](const Piece& p) { return p.type == PieceType::kByte; });
  ProtoWriter writer;
  writer.varint(trainer::kModelType, trainer::kBpe);
  writer.varint(trainer::kVocabSize, pieces.size());
  writer.varint(trainer::kByteFallback, bytes ? 1 : 0);
  writer.varint(trainer::kUnkId, static_cast<uint64_t>(unknown - pieces.begin()));
  writer.varint(trainer::kBosId, id_or_none(vocabulary, "<bos>"));
  writer.varint(trainer::kEosId, id_or_none(vocabulary, "<eos>"));
  writer.varint(trainer::kPadId, id_or_none(vocabulary, "<pad>"));
  writer.bytes(trainer::kUnkSurface, unknown->text);
  writer.bytes(trainer::kUnkPiece, unknown->text);
  writer.bytes(trainer::kBosPiece, "<bos>");
  writer.bytes(trainer::kEosPiece, "<eos>");
  writer.bytes(trainer::kPadPiece, "<pad>");
  return writer.message();
}

std::string serialize_normalizer_spec() {
  ProtoWriter writer;
  writer.bytes(normalizer::kName, "identity");
  writer.bytes(normalizer::kCharacterMap, "");
  writer.varint(normalizer::kAddDummyPrefix, 0);
  writer.varint(normalizer::kRemoveExtraSpaces, 0);
  writer.varint(normalizer::kEscapeSpaces, 1);
  return writer.message();
}

}  // namespace

Vocabulary parse_tokenizer_model(std::string_view bytes, const std::string& place) {
  try {
    return parse_model(bytes);
  } catch (const Error& error) {
    fail("[tokenizer.model] {} ({})", error.what(), place);
  }
}

Vocabulary read_tokenizer_model(const std::string& path) {
  return parse_tokenizer_model(read_file(path, kLargestFile), path);
}

std::string serialize_tokenizer_model(const Vocabulary& vocabulary) {
  return serialize_normalized(normalize_gguf_vocabulary(vocabulary));
}

std::string serialize_normalized(const Vocabulary& vocabulary) {
  check_vocabulary(vocabulary);
  ProtoWriter writer, one;
  for (const Piece& piece : vocabulary.pieces) {
    one.clear();  // which keeps its memory
    serialize_piece(piece, one);
    writer.bytes(model::kPieces, one.message());
  }
  writer.bytes(model::kTrainerSpec, serialize_trainer_spec(vocabulary));
  writer.bytes(model::kNormalizerSpec, serialize_normalizer_spec());
  return writer.message();
}

}  // namespace gemma_torch
