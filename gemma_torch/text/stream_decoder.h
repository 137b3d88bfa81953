#pragma once

#include <cstdint>
#include <string>

namespace gemma_torch {

class Tokenizer;

/// Text of token ids as they come, for display. What push() returned so far and flush() together
/// are Tokenizer::decode() of all the ids.
///
/// A byte piece is held back until the run of byte pieces ends, not only until a character is
/// complete: whether the run reads as UTF-8 or as one U+FFFD per byte is known only then (Hugging
/// Face's rule).
class StreamDecoder {
 public:
  /// `tokenizer` must outlive the decoder.
  explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special = false)
      : tokenizer_(tokenizer), skip_special_(skip_special) {}

  /// The text that is certain with this id. Throws: Error if the id is out of range.
  std::string push(int64_t id);

  /// What is still held back; the decoder is then as new.
  std::string flush();

 private:
  const Tokenizer& tokenizer_;
  bool skip_special_;
  std::string bytes_;  // of the run of byte pieces that has not ended yet
};

}  // namespace gemma_torch
