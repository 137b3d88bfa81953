#pragma once

#include <c10/core/Device.h>

namespace gemma_torch::apps {

/// The speed at which this machine reads memory, bytes a second: the best of several sums over
/// 512 MiB, on as many threads as ATen has. What decoding can reach if it only reads weights.
/// Throws: c10::Error if the memory is not there.
double read_bandwidth(c10::Device device);

}  // namespace gemma_torch::apps
