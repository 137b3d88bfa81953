#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>
#include <vector>

#include "common.h"
#include "prompts.h"

namespace gemma_torch::apps {

/// What the commands share that explain a prediction.
struct ExplainOptions {
  ModelOptions model = {};
  TextOptions text = {};
  TokenOptions tokens = {};
  int64_t position = -1;  // whose next token is meant
  std::string html = {};  // a page
  bool json = false;
};

/// Adds their flags; --dtype is float32 where it is not given: what they show is small.
void add_explain_flags(CLI::App& command, ExplainOptions& options);

/// A model and a prediction of it.
struct Explainable {
  Pretrained loaded = {};
  std::vector<int64_t> ids = {};
  std::vector<int64_t> tokens = {};
  int64_t position = 0;  // from the start

  std::string token_at_position() const;  // "position 5 ·is"
};

/// Throws: as load_modules, read_ids and read_tokens; Error, in the name of the command, for no
/// ids, or ids and a position that are not there.
Explainable read_explainable(const char* command, const ExplainOptions& options);

/// The likeliest token after the position.
int64_t likeliest_next(const Explainable& of);

}  // namespace gemma_torch::apps
