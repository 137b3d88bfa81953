#pragma once

#include <string>

#include "common.h"

namespace gemma_torch::apps {

/// What `gemma bench --grid` runs.
struct GridOptions {
  ModelOptions model = {};
  std::string small_model = {};  // a folder of gemma quantize; empty: that row is not available
  std::string svg = {};          // a file for the chart; empty: none
  std::string format = "md";     // or json
  int64_t n_gen = 64;
  int repetitions = 3;
};

/// The reference's twelve rows (no cache and KV cache, as they are and compiled, on the CPU, an
/// NVIDIA and an Apple GPU) and this project's own. Each runs in a process of its own, `gemma
/// bench`, so that its peak memory is its own and what fails there is a row that says why.
/// Throws: Error if no row ran, or the chart cannot be written.
void run_grid(const GridOptions& options);

}  // namespace gemma_torch::apps
