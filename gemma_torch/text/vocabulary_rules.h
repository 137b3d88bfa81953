#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "gemma_torch/base/vocabulary.h"

namespace gemma_torch {

/// U+2581, which stands for a space inside pieces.
inline constexpr std::string_view kSpaceMark = "\xE2\x96\x81";

/// The pieces that steer the model. In text they count only where special strings are parsed, and
/// decode(.., skip_special) leaves them out.
inline constexpr std::array<std::string_view, 10> kSpecialPieces = {"<pad>",
                                                                    "<eos>",
                                                                    "<bos>",
                                                                    "<unk>",
                                                                    "<mask>",
                                                                    "<start_of_turn>",
                                                                    "<end_of_turn>",
                                                                    "<start_of_image>",
                                                                    "<end_of_image>",
                                                                    "<image_soft_token>"};

bool is_special_piece(std::string_view text);

/// The byte that a piece spelled `<0xHH>` (two upper-case hex digits) stands for; -1 for any other
/// text.
int byte_of_piece(std::string_view text);

/// The one form in which every source gives the same ids, whatever the size of the vocabulary:
///  - spaces inside pieces become U+2581 (GGUF stores runs of them as spaces);
///  - the ten special pieces become CONTROL, `<unk>` UNKNOWN;
///  - `<unusedN>` become USER_DEFINED: text may name them (GGUF calls them CONTROL);
///  - pieces that never merge get the score 0;
///  - a vocabulary with `<end_of_image>` but no `<image_soft_token>` gets it as its last piece: id
///    262144 of Gemma 3, one past the rows of its embedding.
/// Idempotent.
Vocabulary normalize_gguf_vocabulary(Vocabulary vocabulary);

/// Throws: Error naming the first piece, by id, that sentencepiece could not take: empty, not
/// UTF-8, a byte piece that is misspelled or given twice, a user-defined piece with a NUL, a score
/// that is not finite, not exactly one UNKNOWN, some but not all of the 256 byte pieces.
void check_vocabulary(const Vocabulary& vocabulary);

}  // namespace gemma_torch
