#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <vector>

#include "gemma_torch/inspect/direction.h"
#include "gemma_torch/model/gemma3.h"

namespace gemma_torch {

/// Token ids of two prompts that differ in what a direction is to stand for.
struct PromptPair {
  std::vector<int64_t> positive = {};
  std::vector<int64_t> negative = {};
};

enum class DirectionMethod { kMean, kPca };

/// Of which positions of a prompt: the last, or the mean over all but a leading BOS, whose value is
/// large and the same in every prompt.
enum class Pool { kLast, kMean };

struct DirectionOptions {
  Site site = Site::kResidPost;
  std::vector<int64_t> layers = {};  // empty: all
  DirectionMethod method = DirectionMethod::kMean;
  Pool pool = Pool::kLast;
  int64_t bos_id = 2;
  /// Told of the prompts run so far and in all; false stops.
  std::function<bool(int64_t done, int64_t total)> on_progress = {};
};

/// How well a layer's vector tells positive from negative, on the pairs that made it.
struct DirectionFit {
  double norm = 0;       // of the vector
  double agree = 0;      // share of the pairs whose difference points its way
  double explained = 0;  // share of the differences' squares that lies along it
};

struct MadeDirection {
  Direction direction = {};
  std::map<int64_t, DirectionFit> fits = {};  // by layer
};

/// A direction from the differences, positive - negative, of the pairs' values at a site.
/// kMean:  their mean.
/// kPca:   their first principal component, not centred (as llama.cpp's cvector-generator; the same
///         as centred over differences of either sign), in float64. It points to where most of the
///         differences lie on average, and is as long as their mean is along it.
/// So strength 1 is in either case one mean difference.
/// Memory: one prompt's values of the site, and (pairs, E) numbers for each layer.
/// Throws: Error for no pairs, an empty prompt, a bad id, layer or site, before any work; where the
/// differences are all zero; and where it was stopped.
MadeDirection make_direction(Gemma3Model model,
                             const std::vector<PromptPair>& pairs,
                             const DirectionOptions& options = {});

struct SteerOptions {
  std::vector<int64_t> layers = {};  // empty: all that the direction has
  double strength = 1;
  bool keep_norm = false;  // each token's value keeps its length
};

/// A probe that adds strength * vector to the site's value at every position of those layers, for
/// any batch, with or without a cache. Strength and vector are multiplied in float32.
/// Throws: Error as check_direction, for a layer without a vector, and for a strength that is no
/// number; before any run.
Probe steer_probe(const Direction& direction, const SteerOptions& options, const Gemma3Config& cfg);

}  // namespace gemma_torch
