#pragma once

#include <chrono>
#include <string>
#include <vector>

namespace gemma_torch {

/// Time of one kernel of an engine, summed since the last reset.
struct KernelTime {
  std::string kernel;
  double seconds = 0;
  int64_t calls = 0;
};

/// Adds up time by kernel on one thread; nothing while it is off.
class KernelClock {
 public:
  void enable() { on_ = true; }
  bool enabled() const { return on_; }

  void start() {
    if (on_) {
      last_ = std::chrono::steady_clock::now();
    }
  }

  /// The time since start() or the last lap() was `kernel`'s. `kernel` is a literal: its address tells it apart.
  void lap(const char* kernel) {
    if (!on_) {
      return;
    }
    const auto now = std::chrono::steady_clock::now();
    auto& entry = find(kernel);
    entry.seconds += std::chrono::duration<double>(now - last_).count();
    ++entry.calls;
    last_ = now;
  }

  void reset() { entries_.clear(); }

  std::vector<KernelTime> times() const {
    std::vector<KernelTime> times;
    for (const auto& entry : entries_) {
      times.push_back({entry.kernel, entry.seconds, entry.calls});
    }
    return times;
  }

 private:
  struct Entry {
    const char* kernel;
    double seconds = 0;
    int64_t calls = 0;
  };
  Entry& find(const char* kernel) {
    for (auto& entry : entries_) {
      if (entry.kernel == kernel) {
        return entry;
      }
    }
    entries_.push_back({kernel});
    return entries_.back();
  }

  bool on_ = false;
  std::chrono::steady_clock::time_point last_;
  std::vector<Entry> entries_;
};

}  // namespace gemma_torch
