#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "gemma_torch/adapt/trainer.h"

namespace gemma_torch {

/// The checkpoints of one training run: folders step-00000120 in a folder, each whole or not there, with
/// state.safetensors (Trainer::state) and facts.json (what the caller keeps beside it).
class Checkpoints {
 public:
  /// Makes the folder where it is missing; what was left of a cut writing is removed. Throws: Error if it cannot.
  explicit Checkpoints(std::string folder);

  std::vector<int64_t> steps() const;  // of those that are there, ascending

  /// Throws: Error (a full disk, ..); the ones that are there stay whole.
  void save(const Trainer& trainer, const nlohmann::json& facts);

  /// Throws: Error naming the file, and the tensor or field, where there is no such checkpoint or it does not fit.
  void load(int64_t step, Trainer& trainer) const;
  nlohmann::json facts(int64_t step) const;

  /// Removes all others.
  void keep_only(const std::vector<int64_t>& steps);

 private:
  std::string path(int64_t step) const;

  std::string folder_;
};

}  // namespace gemma_torch
