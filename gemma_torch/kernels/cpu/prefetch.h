#pragma once

// Asking for cache lines. In assembly where it can be: g++ takes a function that does nothing else, a loop of
// __builtin_prefetch in a lambda say, for one without effect, and leaves its calls out.

namespace gemma_torch::kernels {

/// Asks for the line of `p` to come to the innermost cache. Any address will do.
[[gnu::always_inline]] inline void prefetch_soon(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(p)));
#elif defined(__aarch64__)
  asm volatile("prfm pldl1keep, %0" : : "Q"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 0, 3);
#endif
}

/// .. to the second cache.
[[gnu::always_inline]] inline void prefetch_later(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(p)));
#elif defined(__aarch64__)
  asm volatile("prfm pldl2keep, %0" : : "Q"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 0, 2);
#endif
}

/// Loads from the line of `p`, which must be readable, and waits for nothing. For lines that are read in order: what
/// fetches ahead by itself follows loads better than it follows what is asked for.
[[gnu::always_inline]] inline void touch(const void* p) {
#if defined(__x86_64__)
  int unused;
  asm volatile("movl %1, %0" : "=r"(unused) : "m"(*static_cast<const int*>(p)));
#else
  prefetch_soon(p);
#endif
}

}  // namespace gemma_torch::kernels
