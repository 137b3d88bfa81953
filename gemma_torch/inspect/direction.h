#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "gemma_torch/io/safetensors.h"
#include "gemma_torch/model/config.h"
#include "gemma_torch/model/probe.h"

namespace gemma_torch {

/// A vector for each of some layers, which is to be added to the value of one kind of site.
struct Direction {
  Site site = Site::kResidPost;
  std::map<int64_t, at::Tensor> vectors = {};  // layer -> float32, as wide as the site
  Metadata made = {};                          // how: "method", "pairs", ..; free-form
};

/// Throws: Error for a site that is no layer's or has heads, and for a vector of a layer that the
/// model has not, or of another width than the site's.
void check_direction(const Direction& direction, const Gemma3Config& cfg);

enum class DirectionFormat {
  kSafetensors,    // `direction.LAYER`; metadata "site" and what `made` holds
  kControlVector,  // llama.cpp's: a GGUF of architecture "controlvector"
};

/// Writes the file whole or not at all. llama.cpp adds `direction.N` to what leaves its layer N,
/// counted from 0 as here: to blocks.N.resid_post. It has none for layer 0.
/// Throws: Error where there is no vector, where the format has no place for the site or for layer
/// 0, and for a failed write.
void save_direction(const Direction& direction, const std::string& path, DirectionFormat format);

/// Reads either format; the file's first bytes say which. Vectors of any float type become float32.
/// Throws: Error naming file and tensor for anything but directions, all of one width.
Direction load_direction(const std::string& path);

}  // namespace gemma_torch
