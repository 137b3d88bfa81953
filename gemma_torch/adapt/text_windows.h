#pragma once

#include <string>

#include "gemma_torch/adapt/training_data.h"

namespace gemma_torch {

class Tokenizer;

struct WindowOptions {
  int64_t max_tokens = 512;  // of a window, <bos> among them
  ReadProgress on_progress = {};
};

/// Cuts one long text into examples: a file of lines {"ids": [..]} for TrainingData, each <bos> and the next
/// max_tokens - 1 ids of the text, so that every id but <bos> is a target once. Special strings are plain text. The
/// text is read and encoded a piece at a time, cut between lines. `out` appears whole or not at all.
/// Throws: Error naming the path for a file that cannot be read, is empty, or has a line of more than 64 MiB, and the
/// line where it is not UTF-8; for a vocabulary without <bos>; for max_tokens below 2.
void write_text_windows(const std::string& path,
                        const Tokenizer& tokenizer,
                        const std::string& out,
                        const WindowOptions& options = {});

}  // namespace gemma_torch
