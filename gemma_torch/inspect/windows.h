#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "gemma_torch/engine/engine.h"

namespace gemma_torch {

/// How a text is cut into windows, each read anew, and which of its tokens are scored.
struct WindowOptions {
  int64_t chunk = 512;   // tokens of a window; 0: the whole text is one sequence
  int64_t bos_id = 2;    // overwrites the first token of each window
  bool sliding = false;  // windows overlap by half
  int64_t step = 512;    // most tokens scored at a time
  int64_t skip = 0;  // scored tokens, whole steps of them, that run_windows does not visit again
  /// In tokens; may throw to stop.
  std::function<void(int64_t done, int64_t total)> on_progress = {};
};

/// Which tokens of a text of `length` are scored, in order.
///
/// With windows of c tokens, those at c/2 + 1 .. c - 1 of each are scored (255 of 512), so that
/// every one has half a window before it; what is left after the last whole window is dropped. This
/// is what llama-perplexity does. As one sequence, every token after the first is scored, and no
/// token is overwritten. Sliding windows score every token after the first too: the first window
/// all of its tokens and without a change, each later one those past the one before, c/2 of them.
/// Throws: Error for a chunk that is no window, or a text that fills none.
std::vector<int64_t> scored_tokens(int64_t length, const WindowOptions& options);

/// Most tokens that an engine holds at a time. Throws: as scored_tokens.
int64_t window_tokens(int64_t length, const WindowOptions& options);

/// Runs the windows of a text through the engine. `visit(first, count)` is called when the engine's
/// last append was of `count` tokens (at most `step`), after which come the tokens first ..
/// first + count - 1 of the text, to be scored with engine.log_prob() or engine.logits(). Windows
/// skipped to their ends are not run; in the next one the engine sees the same appends as without a
/// skip, so that it gives the same bits.
/// Throws: as scored_tokens; Error for an id outside the vocabulary, or if the engine has another
/// batch than 1 or cannot hold a window, before any work; for a `skip` that ends inside a step.
void run_windows(Engine& engine,
                 const std::vector<int64_t>& ids,
                 const WindowOptions& options,
                 const std::function<void(int64_t first, int64_t count)>& visit);

}  // namespace gemma_torch
