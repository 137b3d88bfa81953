#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/inspect/site_table.h"
#include "gemma_torch/model/gemma3.h"

namespace gemma_torch {

/// Which part of a site's value; by default all of it.
struct Part {
  std::vector<int64_t> positions = {};  // places in the sequence; empty: all
  std::optional<int64_t> head = {};     // of sites with the axis H or G
  /// First and last of the innermost axis: of scores and pattern, the positions looked at.
  std::optional<std::pair<int64_t, int64_t>> channels = {};
  int64_t row = -1;  // of the batch; -1: every row
};

enum class Fill {
  kZero,
  kMean,      // over the positions of the pass, of the same row, head and channel
  kNoise,     // Gaussian, the same in every row of a batch
  kAddNoise,  // the value and such noise
  kValue,     // a tensor: another prompt's value, a file's
};

struct Filling {
  Fill fill = Fill::kZero;
  /// Of kValue: the site's axes with B = 1, for the T tokens of the sequence. An axis of size 1
  /// serves all of it, and leading ones may be absent: (E) serves every position.
  at::Tensor value = {};
  double std = 1;  // of noise
  uint64_t seed = 0;
};

/// A part of a site's value, and what takes its place.
struct Edit {
  SiteAt site = {};
  Part part = {};
  Filling with = {};
};

/// A probe that makes the edits wherever it meets their sites, one after another, each on what the
/// ones before it left. The value itself is never written to, and gradients flow.
/// Noise is drawn on the CPU from the seed, the site and the position, so it repeats, and two sites
/// with one seed differ. With a cache, positions are places in the whole sequence; kMean and noise
/// see one pass at a time.
/// `T`:    tokens of the sequence, for which positions and values are checked.
/// Throws: Error if a site, position, head, channel or value does not fit the model; before any
/// run. The probe throws where a pass reaches a position that a value does not hold.
Probe edits_probe(std::vector<Edit> edits, const Gemma3Config& cfg, int64_t T);

/// The values of sites in one run on ids (1, T) int64, without a cache and without gradients, under
/// their names, shapes as site_shape(.., B = 1, T).
/// Throws: Error if ids are not (1, T).
TensorMap site_values(Gemma3Model model, const at::Tensor& ids, const std::vector<SiteAt>& sites);

}  // namespace gemma_torch
