#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "gemma_torch/base/vocabulary.h"

namespace sentencepiece {
class SentencePieceProcessor;
}

namespace gemma_torch {

struct EncodeOptions {
  bool add_bos = true;        // first id is bos_id(), for an empty text too
  bool parse_special = true;  // "<start_of_turn>" is one id; false: special strings are plain text
};

/// Text to token ids and back, with the ids that Hugging Face's tokenizer gives on the same
/// vocabulary. sentencepiece cuts plain text; special strings and literal U+2581 are found before
/// it sees the text. A copy shares sentencepiece's model and has its own piece table. const calls
/// are thread-safe.
class Tokenizer {
 public:
  /// Throws: Error if check_vocabulary finds a fault, or sentencepiece one (a piece given twice).
  /// The vocabulary is brought into the common form first (normalize_gguf_vocabulary).
  explicit Tokenizer(Vocabulary vocabulary);

  /// Throws: Error naming the byte offset if `text` is not UTF-8; if BOS is asked for and unknown.
  std::vector<int64_t> encode(std::string_view text, EncodeOptions options = {}) const;

  /// Concatenated pieces with U+2581 as spaces, nothing stripped. A run of byte pieces becomes its
  /// characters if all of it is UTF-8, else one U+FFFD per byte, as in Hugging Face's ByteFallback
  /// decoder. skip_special leaves the special pieces out, before byte runs form. Throws: Error if
  /// an id is out of range.
  std::string decode(const std::vector<int64_t>& ids, bool skip_special = false) const;

  /// The piece as the vocabulary writes it. Throws: Error naming id and size if out of range.
  const std::string& piece(int64_t id) const { return at(id).text; }
  int64_t id_of(std::string_view piece) const;  // -1 where there is no such piece
  bool is_special(int64_t id) const { return is_special_[index(id)]; }
  /// The byte (0 .. 255) that a byte piece stands for, -1 for other pieces.
  int byte_value(int64_t id) const;

  int64_t size() const { return static_cast<int64_t>(pieces_.size()); }
  // -1 where the vocabulary has no such piece
  int64_t pad_id() const { return id_of("<pad>"); }
  int64_t eos_id() const { return id_of("<eos>"); }
  int64_t bos_id() const { return id_of("<bos>"); }
  int64_t unk_id() const { return id_of("<unk>"); }
  int64_t start_of_turn_id() const { return id_of("<start_of_turn>"); }
  int64_t end_of_turn_id() const { return id_of("<end_of_turn>"); }
  /// Where generation ends as far as a vocabulary tells: <eos>. Whether <end_of_turn> ends it too
  /// is a matter of the model (instruct or base), which its configuration says.
  std::vector<int64_t> stop_ids() const;

 private:
  /// An id found in raw text and the bytes it covers; 0 bytes: none there.
  struct Match {
    int64_t id = -1;
    size_t bytes = 0;
  };

  size_t index(int64_t id) const;
  const Piece& at(int64_t id) const { return pieces_[index(id)]; }
  void find_specials();
  void find_space_runs();
  void find_newline_rule();
  Match special_at(std::string_view text, bool parse_special) const;
  void encode_plain(std::string_view text, std::vector<int64_t>& ids) const;
  void encode_span(std::string_view text, std::vector<int64_t>& ids) const;

  std::vector<Piece> pieces_;
  std::vector<bool> is_special_;
  std::vector<int64_t> special_ids_;            // those of kSpecialPieces that the vocabulary has
  std::array<int64_t, 32> space_run_ids_ = {};  // [n]: the piece of n U+2581, n >= 2; -1: none
  bool newlines_stand_alone_ = false;           // text may be cut after a run of newlines
  std::shared_ptr<const sentencepiece::SentencePieceProcessor> processor_;
};

}  // namespace gemma_torch
