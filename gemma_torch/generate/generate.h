#pragma once

#include <cstdint>
#include <vector>

#include "gemma_torch/engine/engine.h"

namespace gemma_torch {

struct GenerateOptions {
  int64_t max_new_tokens = 64;
  Sampling sampling = {};
  std::vector<int64_t> stop_ids = {};  // a token of these ends its row, and is its last
};

enum class FinishReason { kStop, kLength, kCallback };

/// "stop", "length" or "callback".
const char* finish_name(FinishReason reason);

struct Generation {
  std::vector<int64_t> ids = {};  // the new tokens, a stop id among them
  FinishReason finish = FinishReason::kLength;
};

struct GenerateResult {
  std::vector<Generation> rows = {};
  int64_t prompt_tokens = 0;  // run in this call, padding not counted
  double prefill_seconds = 0;
  double first_token_seconds = 0;  // from the call to the first token
  double decode_seconds = 0;       // from the first token to the last
  int64_t decode_steps = 0;        // tokens after the first, of the longest row
};

/// Appends the prompts, one for each row of the engine, and goes on from them.
///
/// One row goes on from what the engine holds. More rows start in an empty engine and are padded on the left.
/// Throws: Error for an empty prompt, a wrong count of prompts, or a prompt and new tokens above the capacity;
/// before any work.
GenerateResult generate(Engine& engine,
                        const std::vector<std::vector<int64_t>>& prompts,
                        const GenerateOptions& options,
                        const OnToken& on_token = {});

/// A conversation in one engine: every turn appends only its own tokens, among them the one which the turn before
/// chose last (and which no pass has seen yet).
class Session {
 public:
  explicit Session(Engine& engine) : engine_(engine) {}

  /// Tokens that the next turn appends before its own.
  int64_t pending() const { return static_cast<int64_t>(pending_.size()); }

  /// Tokens that still fit.
  int64_t room() const { return engine_.capacity() - engine_.position() - pending(); }

  GenerateResult turn(const std::vector<int64_t>& ids,
                      const GenerateOptions& options,
                      const OnToken& on_token = {});

  /// Adds ids to what the next turn appends first (closing a turn that was cut).
  void close(const std::vector<int64_t>& ids) {
    pending_.insert(pending_.end(), ids.begin(), ids.end());
  }

 private:
  Engine& engine_;
  std::vector<int64_t> pending_;  // chosen, not appended
};

}  // namespace gemma_torch
