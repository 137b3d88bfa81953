#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "gemma_torch/base/error.h"

/// Damaged input may end in Error. Any other exception, and whatever the sanitizers see, is a finding.
template <typename Act>
int load_or_refuse(Act act) {
  try {
    act();
  } catch (const gemma_torch::Error&) {
    return 0;
  }
  return 0;
}

inline std::string_view as_text(const uint8_t* data, size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}
