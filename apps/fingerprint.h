#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gemma_torch/pretrained.h"

namespace gemma_torch::apps {

/// A short name for data, to tell whether two are the same: FNV-1a, 64 bits. No protection against
/// anyone who wants them to look the same.
class Fingerprint {
 public:
  void add(const void* data, size_t bytes);
  void add(const std::string& text) { add(text.data(), text.size() + 1); }
  void add(int64_t number) { add(&number, sizeof number); }
  void add(const std::vector<int64_t>& numbers);
  std::string hex() const;

 private:
  uint64_t state_ = 0xcbf29ce484222325U;
};

/// Of a model's weights: each tensor's name, shape and first 2,048 numbers.
std::string fingerprint(const Gemma3Model& model);

/// {weights, dtype, device}: what numbers out of the modules depend on, for the header of a file
/// that a later run goes on with.
nlohmann::json numbers_json(const Pretrained& loaded);

}  // namespace gemma_torch::apps
