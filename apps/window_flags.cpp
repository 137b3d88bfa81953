#include "window_flags.h"

namespace gemma_torch::apps {

void add_chunk_flag(CLI::App& command, int64_t& chunk) {
  command
      .add_option("-c,--chunk",
                  chunk,
                  "tokens of a window, its second half scored as llama-perplexity does; 0: the "
                  "whole text as one sequence")
      ->capture_default_str();
}

int64_t bos_id(const std::optional<Tokenizer>& tokenizer) {
  constexpr int64_t kBos = 2;
  return tokenizer ? tokenizer->bos_id() : kBos;
}

}  // namespace gemma_torch::apps
