#include "roofline_sums.h"

#include <fmt/format.h>

namespace gemma_torch::apps {
namespace {

constexpr size_t kLine = 64;    // bytes of a cache line
constexpr size_t kBurst = 256;  // bytes read from one stream before the next one's turn

// Two sums a stream: an add waits for the one before it, and must not be what is timed.
template <typename Vector, int kStreams, int kAhead>
[[gnu::always_inline]] inline uint64_t sum_streams(const std::byte* data, size_t bytes) {
  const size_t part = bytes / kStreams;
  Vector sums[kStreams][2] = {};
  for (size_t start = 0; start < part; start += kBurst) {
    for (size_t stream = 0; stream < kStreams; ++stream) {
      const auto* burst = data + stream * part + start;
      for (size_t at = 0; kAhead > 0 && at < kBurst; at += kLine) {
        __builtin_prefetch(burst + at + kAhead);  // past the end it does nothing
      }
      const auto* words = reinterpret_cast<const Vector*>(burst);
      for (size_t i = 0; i < kBurst / sizeof(Vector); i += 2) {
        sums[stream][0] += words[i];
        sums[stream][1] += words[i + 1];
      }
    }
  }
  uint64_t total = 0;
  for (const auto& pair : sums) {
    const Vector both = pair[0] + pair[1];
    for (size_t lane = 0; lane < sizeof(Vector) / sizeof(uint64_t); ++lane) {
      total += both[lane];
    }
  }
  return total;
}

// One struct for each instruction set: an attribute, not a compiler option, lets one file hold all.
struct Generic {
  typedef uint64_t Vector __attribute__((vector_size(16), may_alias));
  template <int kStreams, int kAhead>
  static uint64_t sum(const std::byte* data, size_t bytes) {
    return sum_streams<Vector, kStreams, kAhead>(data, bytes);
  }
};

#ifdef __x86_64__
struct Avx2 {
  typedef uint64_t Vector __attribute__((vector_size(32), may_alias));
  template <int kStreams, int kAhead>
  [[gnu::target("avx2")]] static uint64_t sum(const std::byte* data, size_t bytes) {
    return sum_streams<Vector, kStreams, kAhead>(data, bytes);
  }
};

struct Avx512 {
  typedef uint64_t Vector __attribute__((vector_size(64), may_alias));
  template <int kStreams, int kAhead>
  [[gnu::target("avx512f")]] static uint64_t sum(const std::byte* data, size_t bytes) {
    return sum_streams<Vector, kStreams, kAhead>(data, bytes);
  }
};
#endif

template <typename Isa, int kStreams>
void add_readings(std::vector<Reading>& all) {
  all.push_back({kStreams, 0, Isa::template sum<kStreams, 0>});
  all.push_back({kStreams, 1024, Isa::template sum<kStreams, 1024>});
  all.push_back({kStreams, 8192, Isa::template sum<kStreams, 8192>});
}

template <typename Isa>
std::vector<Reading> readings_of() {
  std::vector<Reading> all;
  add_readings<Isa, 1>(all);
  add_readings<Isa, 2>(all);
  add_readings<Isa, 4>(all);
  return all;
}

std::vector<Reading> widest() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f")) {
    return readings_of<Avx512>();
  }
  if (__builtin_cpu_supports("avx2")) {
    return readings_of<Avx2>();
  }
#endif
  return readings_of<Generic>();
}

}  // namespace

const std::vector<Reading>& readings() {
  static const auto all = widest();
  return all;
}

std::string reading_name(const Reading& reading) {
  const auto ahead = reading.ahead > 0 ? fmt::format("prefetch {}", reading.ahead) : "no prefetch";
  return fmt::format("{} stream{}, {}", reading.streams, reading.streams == 1 ? "" : "s", ahead);
}

}  // namespace gemma_torch::apps
