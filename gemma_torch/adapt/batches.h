#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "gemma_torch/adapt/training_data.h"
#include "gemma_torch/model/kv_cache.h"

namespace gemma_torch {

/// Some examples as the model takes them, on the CPU. Rows end in padding of id 0.
struct TrainingBatch {
  at::Tensor ids;  // (B, T) int64
  /// (B, T) int64, the column where the token's own example begins (for padding: its own column);
  /// undefined where no row holds more than one example.
  at::Tensor first;
  at::Tensor scored;   // (N) int64, flat places b * T + t from which a target is predicted, N >= 1
  at::Tensor targets;  // (N) int64, the ids to predict there
  int64_t tokens = 0;  // without padding
  std::vector<int64_t> examples = {};  // of TrainingData, in row order
};

/// Where the tokens of a batch stand: what Gemma3Model::hidden(ids, placement, nullptr) needs so
/// that no example attends to another one of its row. On the device of `ids` (B, T). `first` (B, T)
/// or undefined, from the batch.
Placement training_placement(const at::Tensor& ids, const at::Tensor& first);

struct BatchOptions {
  int64_t rows = 4;          // of a batch
  int64_t max_tokens = 512;  // columns of a batch at most
  bool pack = false;         // several examples a row, as many as fit
  bool shuffle = true;       // anew in each epoch; false: in the order of the file
  uint64_t seed = 0;
  int64_t rank = 0, ranks = 1;  // this process among those that train together
};

/// A place in the sequence of batches that all ranks share.
struct BatchPosition {
  int64_t epoch = 0;
  int64_t batch = 0;  // of the epoch
  bool operator==(const BatchPosition&) const = default;
};

/// A permutation of 0 .. n-1 for one epoch, the same on every machine: std::mt19937_64 seeded with
/// std::seed_seq of the 32-bit halves of seed and epoch, low ones first; Fisher-Yates from the end;
/// bounded draws by rejection.
std::vector<int64_t> shuffled(int64_t n, uint64_t seed, int64_t epoch);

/// Batches without end, epoch after epoch, each epoch holding every example exactly once.
///
/// Packing puts examples into a row in their order while they fit whole, then begins the next row,
/// so that the number of batches may differ between epochs. The last batch of an epoch may have
/// fewer rows. What a batch holds depends on options and lengths alone: a seek reads no file.
///
/// All ranks share one sequence of batches, which runs on from epoch to epoch: the j-th call of
/// next() on rank r gives batch j * ranks + r of it. So a step of A batches on each of N ranks sees
/// what one rank sees in a step of N * A, and none is dropped or read twice where an epoch's count
/// does not divide; such a step has batches of two epochs. To end after E epochs, a rank calls
/// next() only while upcoming().epoch < E: in the last step some ranks may have fewer batches, or
/// none, and take part with what they have, so weigh by targets, not by ranks.
///
/// Not thread-safe. Keeps 16 bytes an example, and refers to `data`, which must live as long.
class Batches {
 public:
  /// Throws: Error for rows or ranks below 1, a rank that is none of them, or max_tokens below the
  /// longest example.
  Batches(const TrainingData& data, const BatchOptions& options);

  /// Throws: Error as TrainingData::example().
  TrainingBatch next();

  /// Batches of one epoch, all ranks together. With packing it costs a pass over the lengths.
  int64_t per_epoch(int64_t epoch) const;

  /// The first batch that no rank has served, if all have called next() as often: what a checkpoint
  /// keeps. seek() to it goes on with the same batches, on any number of ranks.
  BatchPosition position() const { return position_; }
  /// The batch that next() gives on this rank: position() on rank 0.
  BatchPosition upcoming() const { return upcoming_; }
  /// Throws: Error if there is no such batch.
  void seek(BatchPosition position);

  const BatchOptions& options() const { return options_; }
  const TrainingData& data() const { return *data_; }

 private:
  /// An epoch: examples in order, and where rows begin in that order (one more: the end).
  struct Plan {
    int64_t epoch = -1;
    std::vector<int64_t> order = {}, rows = {};
  };

  Plan plan_of(int64_t epoch) const;
  TrainingBatch read(int64_t batch) const;
  int64_t batches_of(const Plan& plan) const;
  BatchPosition moved(BatchPosition position, int64_t batches) const;

  const TrainingData* data_;
  BatchOptions options_;
  Plan plan_;  // of the epoch served last
  BatchPosition position_, upcoming_;
};

}  // namespace gemma_torch
