#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "gemma_torch/inspect/site_table.h"
#include "gemma_torch/model/gemma3.h"

namespace gemma_torch {

struct SweepOptions {
  std::vector<Site> sites = {};  // of layers: each gives one map
  /// Scored at the last position: the logit of the first less that of the second, or of one alone.
  std::vector<int64_t> tokens = {};
  int64_t batch = 16;  // patched runs in one pass
  /// Told of the patched runs done and in all; false stops.
  std::function<bool(int64_t done, int64_t total)> on_progress = {};
  /// Scores of the first passes, as on_scores was told them by an earlier sweep with the same
  /// arguments: those are not run again.
  std::vector<double> found = {};
  std::function<void(const std::vector<double>& of_one_pass)> on_scores = {};
};

/// Scores of the corrupted run with one value of the clean run in its place.
struct SweepMap {
  Site site = Site::kResidPre;
  /// Columns are heads, each patched at all positions, else positions: (L, H or G), (L, T) float64.
  bool by_head = false;
  at::Tensor scores = {};
};

struct Sweep {
  double clean = 0, corrupted = 0;  // scores of the two runs
  std::vector<SweepMap> maps = {};  // in the order of the sites

  /// 0: as the corrupted run; 1: as the clean one. Below 0 and above 1 where a patch goes further.
  at::Tensor normalised(const SweepMap& map) const {
    return (map.scores - corrupted) / (clean - corrupted);
  }
};

/// Whether a sweep over this site goes through heads; else through positions.
bool swept_by_head(Site site);

/// Activation patching: runs `corrupted` once for every layer and position (or head) of each site,
/// with the value that the site has there in a run of `clean`.
/// Shapes: clean and corrupted (1, T) int64, of one length.
/// Memory: the clean values of the sites, and a pass of `batch` rows.
/// Throws: Error for prompts of two lengths, a site outside of layers, an id outside the
/// vocabulary, prompts that score alike, or found scores that are not of whole passes; where it was
/// stopped.
Sweep sweep(Gemma3Model model,
            const at::Tensor& clean,
            const at::Tensor& corrupted,
            const SweepOptions& options);

}  // namespace gemma_torch
