#pragma once

#include <c10/core/Device.h>
#include <sys/types.h>

#include <chrono>
#include <string>
#include <vector>

namespace gemma_torch::apps {

/// Seconds of the passes over 512 MiB: one row for each way of reading (readings() on the CPU).
using Passes = std::vector<std::vector<double>>;

/// The way of reading whose median pass was the fastest.
struct Roofline {
  double bytes_per_second = 0;
  std::string reading;  // "2 streams, prefetch 1024"
};
Roofline best_median(const Passes& passes);

/// `first` with the passes of `second` after its own.
Passes joined(Passes first, const Passes& second);

/// How fast this machine reads memory, which is what decoding can reach if it only reads weights.
/// On the CPU a process of its own sums 512 MiB on pages of 2 MiB, so that its memory is not in
/// this one's peak, and its pages are the same ones from the first pass to the last.
class RooflineMeter {
 public:
  /// Starts that process. Call it before any thread is started: a fork copies only its own.
  RooflineMeter();
  ~RooflineMeter();
  RooflineMeter(const RooflineMeter&) = delete;
  RooflineMeter& operator=(const RooflineMeter&) = delete;

  /// Three passes of every reading, in turn; on the CPU with `threads` threads. Those of the last
  /// call where they are the same and less than a second old: many short tests take no longer.
  /// Throws: Error if there are not 512 MiB.
  const Passes& now(c10::Device device, int threads);

 private:
  Passes measure(c10::Device device, int threads);

  Passes last_;
  int last_threads_ = 0;
  std::chrono::steady_clock::time_point last_time_;
  int requests_ = -1;  // descriptors of the pipes to and from the process
  int replies_ = -1;
  pid_t process_ = -1;
};

}  // namespace gemma_torch::apps
