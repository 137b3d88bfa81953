#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>

#include "gemma_torch/text/tokenizer.h"

namespace gemma_torch::apps {

/// -c, as llama-perplexity has it.
void add_chunk_flag(CLI::App& command, int64_t& chunk);

/// The <bos> of a tokenizer, or where there is none that of every Gemma 3.
int64_t bos_id(const std::optional<Tokenizer>& tokenizer);

}  // namespace gemma_torch::apps
