#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "gemma_torch/inspect/steer.h"

namespace gemma_torch {

struct MeasureOptions {
  std::vector<int64_t> toward = {};  // next tokens that the direction should make likelier
  std::vector<int64_t> away = {};    // and those it should make less likely
  std::vector<double> strengths = {};
  std::vector<int64_t> layers = {};  // as in SteerOptions
  bool keep_norm = false;
  /// Told of the runs so far and in all; false stops.
  std::function<bool(int64_t done, int64_t total)> on_progress = {};
};

/// What one strength does.
struct MeasureRow {
  double strength = 0;
  std::vector<double> scores = {};  // of each prompt
  double mean = 0;                  // of the scores
  double kl = 0;  // mean KL, nats, of the next token's distribution from the unsteered one
};

/// For each strength, how far steering moves the next token after each prompt. A score is the
/// natural logarithm of P(toward) / P(away), each the sum over its tokens.
/// Throws: Error for no prompts, strengths or tokens, an empty prompt, a bad id, and as
/// steer_probe; before any work; and where it was stopped.
std::vector<MeasureRow> measure_steering(Gemma3Model model,
                                         const Direction& direction,
                                         const std::vector<std::vector<int64_t>>& prompts,
                                         const MeasureOptions& options);

/// Whether the means never stop growing as the strengths do. False for fewer than two rows.
bool grows_with_strength(std::vector<MeasureRow> rows);

}  // namespace gemma_torch
