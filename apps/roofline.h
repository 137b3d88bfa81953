#pragma once

#include <c10/core/Device.h>
#include <sys/types.h>

#include <chrono>
#include <string>
#include <vector>

namespace gemma_torch::apps {

/// Seconds of one pass over 512 MiB by each way of reading (readings() on the CPU).
using Round = std::vector<double>;

/// The way of reading whose median pass was the fastest.
struct Roofline {
  double bytes_per_second = 0;  // of the median pass
  std::string reading;          // "2 streams, prefetch 1024"
  std::vector<double> seconds;  // of its pass in each round
  double bytes = 0;             // of a pass
};
Roofline best_median(const std::vector<Round>& rounds);

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

  /// One pass of every reading, in turn; on the CPU with `threads` threads. The last round where
  /// that is less than a quarter of a second old: many short tests take no longer.
  /// Throws: Error if there are not 512 MiB.
  const Round& now(c10::Device device, int threads);

 private:
  Round measure(c10::Device device, int threads);

  Round last_;
  int last_threads_ = 0;
  std::chrono::steady_clock::time_point last_time_;
  int requests_ = -1;  // descriptors of the pipes to and from the process
  int replies_ = -1;
  pid_t process_ = -1;
};

}  // namespace gemma_torch::apps
