#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "gemma_torch/io/safetensors.h"
#include "gemma_torch/model/gemma3.h"

namespace gemma_torch {

struct CaptureOptions {
  std::vector<std::string> sites = {};  // names or globs, as match_sites takes them
  /// Of the values in the file: float32 or bfloat16; default: what the model computed them in.
  std::optional<c10::ScalarType> save_dtype = {};
  bool numbered = false;   // keys are "prompt.0.embed": for many prompts
  Metadata metadata = {};  // added to the file's own
  /// Told of the tensors written so far and in all; false stops, and leaves no file.
  std::function<bool(int64_t done, int64_t total)> on_progress = {};
  /// Given: a file that is not finished stays as part_path(path), which holds so many prompts by
  /// now, from the same arguments. Going on from what on_prompt was told last gives the same bytes.
  std::optional<int64_t> kept_prompts = {};
  std::function<void(int64_t prompts)> on_prompt = {};  // the first so many are in the file
};

struct CaptureReport {
  int64_t tokens = 0;
  int64_t tensors = 0;  // values of sites; each prompt's ids come on top
  uint64_t bytes = 0;   // of the file
};

/// Runs each prompt through the modules, alone and without a cache, and writes the values of the
/// sites asked for to the safetensors file `path` as they are formed. Of them, one is in memory at
/// a time (of logits 64 rows), beside what a pass needs: attention holds a few (H, T, T) tensors.
/// Tensors:   `ids` (1, T) int64 and the sites under their names, shapes as site_shape(.., B = 1).
/// Metadata:  "reference", "dtype" (computed in), "save_dtype", and "axes.SITE" for each kind. With
///            one prompt the file is also a dump for compare_with_dump.
/// Throws:    Error for a glob without a site, an empty prompt, an id outside the vocabulary or
///            another dtype, before any work; for a failed write; and where it was stopped.
CaptureReport capture(Gemma3Model model,
                      const std::vector<std::vector<int64_t>>& prompts,
                      const CaptureOptions& options,
                      const std::string& path);

}  // namespace gemma_torch
