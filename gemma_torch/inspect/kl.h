#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "gemma_torch/engine/engine.h"
#include "gemma_torch/inspect/divergence.h"
#include "gemma_torch/inspect/windows.h"
#include "gemma_torch/io/safetensors.h"

namespace gemma_torch {

/// Next-token distributions of a text in a safetensors file, to hold other engines against.
/// Tensors:  `ids` (N) int64, the text; `index` (P) int64, which of its tokens are predicted;
///           `codes` (P, V) uint16: ln p = -(codes / 8192)^2. Probabilities below e^-64 become that;
///           ln p = -x is kept to within sqrt(x) / 8192, so p of 1/2 to 1 part in 10,000. Reading
///           makes each row sum to 1 again, which moves all of it alike, by no more than the mean of
///           that. The KL of a distribution from its own codes is about 2.5e-9 times its entropy in
///           nats: smaller ones are not seen.
/// Size:     2 V bytes a position: 524,288 of Gemma's, half a MiB.
/// Metadata: "chunk", "bos_id", and what the caller adds.
struct SavedReport {
  int64_t positions = 0;
  uint64_t bytes = 0;  // of the file
  double nll = 0;      // nats; perplexity is exp of it
};

/// How far a file is that is not whole yet.
struct SavedPart {
  int64_t positions = 0;  // whose distributions are in it
  double log_prob = 0;    // sum of ln p of their tokens
};

struct SaveOptions {
  WindowOptions windows = {};  // its step apart, which is 32, and its skip
  Metadata metadata = {};
  /// Given: a file that is not finished stays as part_path(path), which holds so much by now, from
  /// the same arguments. Going on from what on_part was told last gives the same bytes.
  std::optional<SavedPart> from = {};
  std::function<void(const SavedPart&)> on_part = {};
};

/// Writes the distributions of the positions that the windows give, as they are formed: holds
/// (32, V) numbers about seven times, 250 MB of Gemma's.
/// Throws: as run_windows; Error for logits that are no numbers, or a failed write. Leaves no file
/// then, nor where on_progress throws, unless `from` is given.
SavedReport save_distributions(Engine& engine,
                               const std::vector<int64_t>& ids,
                               const SaveOptions& options,
                               const std::string& path);

/// Such a file. Its codes stay in it, mapped.
class SavedDistributions {
 public:
  /// Throws: Error for a file of another kind or one whose parts contradict each other.
  explicit SavedDistributions(const std::string& path);

  /// ln p of positions first .. first + count - 1, (count, V) float32, exp of each row summing to 1.
  at::Tensor log_p(int64_t first, int64_t count) const;

  const std::vector<int64_t>& ids() const { return ids_; }
  const WindowOptions& windows() const { return windows_; }
  int64_t positions() const { return codes_.size(0); }
  int64_t vocab_size() const { return codes_.size(1); }
  const Metadata& metadata() const { return metadata_; }

 private:
  std::vector<int64_t> ids_;
  WindowOptions windows_;
  at::Tensor codes_;  // (P, V) uint16
  Metadata metadata_;
};

/// How far the engine's distributions are from the saved ones, position by position. Memory: as
/// save_distributions.
/// Throws: Error for an engine of another vocabulary, and as run_windows; before any work.
std::vector<PositionDivergence> compare_with_saved(
    Engine& engine,
    const SavedDistributions& saved,
    const std::function<void(int64_t done, int64_t total)>& on_progress = {});

}  // namespace gemma_torch
