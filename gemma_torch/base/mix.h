#pragma once

#include <cstdint>

namespace gemma_torch {

/// What SplitMix64 adds to its state for each number.
constexpr uint64_t kMixStep = 0x9e3779b97f4a7c15U;

/// A step of SplitMix64: neighbouring states and numbers give seeds that are not related.
inline uint64_t mix(uint64_t state, int64_t more) {
  state += kMixStep + static_cast<uint64_t>(more);
  state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9U;
  state = (state ^ (state >> 27)) * 0x94d049bb133111ebU;
  return state ^ (state >> 31);
}

}  // namespace gemma_torch
