#pragma once

#include <functional>
#include <string>
#include <vector>

#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/engine/engine.h"
#include "gemma_torch/model/gemma3.h"

namespace gemma_torch {

/// How far one site of our run is from a dump of another implementation.
struct SiteParity {
  std::string site = {};  // "blocks.3.q"
  double max_abs = 0;     // largest |ours - theirs|; NaN if one of them holds a NaN
  double mean_abs = 0;
  double max_reference = 0;  // largest |theirs|
  double tolerance = 0;      // of max_abs

  bool ok() const { return max_abs <= tolerance; }  // a NaN is not
};

/// Largest difference allowed at a site whose values reach `max_reference`, where the coarser of
/// the two runs computed in `dtype`.
double parity_tolerance(Site site, c10::ScalarType dtype, double max_reference);

/// Runs the model on the dump's `ids` (1, T) int64, without a cache, and compares the value at
/// every site that the dump holds. Scores count only where they are not masked: what stands elsewhere
/// belongs to no result. `on_site` hears of each as soon as it is known, in the order computed.
/// Throws: Error naming the tensor if the dump lacks ids, holds a shape of another model, or a
/// name that is no site of this one.
std::vector<SiteParity> compare_with_dump(
    Gemma3Model model,
    const TensorMap& dump,
    const std::function<void(const SiteParity&)>& on_site = {});

/// The same for an engine, empty or not, which shows nothing but its logits: the dump must hold `logits` (1, T, V).
/// Throws: Error if it does not, or if they are another model's.
SiteParity compare_logits(Engine& engine, const TensorMap& dump);

/// Every site's value in a run of the model on ids (1, T) int64 without a cache, on the CPU, under the names that
/// compare_with_dump reads; `ids` among them.
TensorMap dump_of(Gemma3Model model, const at::Tensor& ids);

/// What the model's own logits say of n greedy tokens that an engine's decode() makes after ids (1, T): how far the one
/// chosen lies below the best, where the model reads the engine's tokens. The values are logits, of positions T - 1 to
/// T + n - 2, and twice their tolerance is allowed: the engine may be off at either of two tokens.
/// Throws: Error if the engine holds fewer than T + n - 1 tokens.
SiteParity compare_decode(Engine& engine, Gemma3Model model, const at::Tensor& ids, int64_t n);

}  // namespace gemma_torch
