#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace gemma_torch::apps {

/// The layers of "5", "8-12" or "3,8-12"; none of "". Throws: Error quoting what is no layer.
std::vector<int64_t> parse_layers(const std::string& list);

}  // namespace gemma_torch::apps
