#include "gemma_torch/inspect/windows.h"

#include <algorithm>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

// Tokens begin .. end - 1 of the text, of which those from `first` on are scored.
struct Window {
  int64_t begin = 0, end = 0, first = 1;
  bool overwritten = false;  // the first token gives way to BOS
};

std::vector<Window> cut(int64_t length, const WindowOptions& options) {
  const auto c = options.chunk;
  check(c == 0 || c >= 4, "[windows] chunk: expected 0 or at least 4 tokens, got {}", c);
  check(c == 0 || options.sliding || length >= c,
        "[windows] text: expected at least one chunk of {} tokens, got {}. Hint: a smaller -c, or "
        "-c 0 for the whole text as one sequence",
        c,
        length);
  check(length >= 2, "[windows] text: expected at least 2 tokens, got {}", length);
  if (c == 0) {
    return {{0, length, 1}};
  }
  std::vector<Window> windows;
  if (!options.sliding) {
    for (int64_t begin = 0; begin + c <= length; begin += c) {
      windows.push_back({begin, begin + c, begin + c / 2 + 1, true});
    }
    return windows;
  }
  windows.push_back({0, std::min(c, length), 1});
  for (auto first = c; first < length; first = windows.back().end) {
    const auto begin = first - c / 2;
    windows.push_back({begin, std::min(begin + c, length), first, true});
  }
  return windows;
}

std::vector<int64_t> slice(const std::vector<int64_t>& ids, int64_t begin, int64_t end) {
  return {ids.begin() + begin, ids.begin() + end};
}

}  // namespace

std::vector<int64_t> scored_tokens(int64_t length, const WindowOptions& options) {
  std::vector<int64_t> indices;
  for (const auto& window : cut(length, options)) {
    for (auto index = window.first; index < window.end; ++index) {
      indices.push_back(index);
    }
  }
  return indices;
}

int64_t window_tokens(int64_t length, const WindowOptions& options) {
  return cut(length, options)[0].end - 1;  // the last is predicted, never run
}

void run_windows(Engine& engine,
                 const std::vector<int64_t>& ids,
                 const WindowOptions& options,
                 const std::function<void(int64_t, int64_t)>& visit) {
  const auto length = static_cast<int64_t>(ids.size());
  const auto windows = cut(length, options);
  const auto needed = window_tokens(length, options);
  check(engine.batch() == 1 && engine.capacity() >= needed,
        "[windows] engine: expected batch 1 and a capacity of {}, got {} and {}",
        needed,
        engine.batch(),
        engine.capacity());
  for (const auto id : ids) {  // the last of a window is predicted and never run: no append sees it
    check(id >= 0 && id < engine.vocab_size(),
          "[windows] token id: expected 0 to {}, got {}",
          engine.vocab_size() - 1,
          id);
  }
  auto skip = options.skip;
  for (const auto& window : windows) {
    if (const auto scored = window.end - window.first; skip >= scored) {
      skip -= scored;
      continue;
    }
    engine.reset();
    auto context = slice(ids, window.begin, window.first - 1);
    if (window.overwritten) {
      context[0] = options.bos_id;
    }
    if (!context.empty()) {
      engine.append(context);
    }
    for (auto first = window.first; first < window.end; first += options.step) {
      const auto end = std::min(first + options.step, window.end);
      engine.append(slice(ids, first - 1, end - 1));
      if (skip > 0) {
        check(skip >= end - first,
              "[windows] skip: expected whole steps of {} tokens, got {}",
              options.step,
              options.skip);
        skip -= end - first;
        continue;
      }
      visit(first, end - first);
      if (options.on_progress) {
        options.on_progress(end, windows.back().end);
      }
    }
  }
}

}  // namespace gemma_torch
