#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace gemma_torch::kernels {

/// Threads that work on one thing together, the caller among them. They wait for work, and for each other, spinning
/// for some microseconds, then yielding their core (others may need it: a barrier that only spins collapses as soon
/// as cores are shared), and between jobs at last asleep.
class Team {
 public:
  /// threads: at least 1. `pin` binds thread i to the i-th core this process may use.
  explicit Team(int threads, bool pin = false);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  /// Runs work(i) on every thread i of 0 .. size() - 1, and returns when all have. `work` may not throw. Allocates
  /// nothing.
  template <typename Work>
  void run(const Work& work) {
    run_erased([](const void* context, int i) { (*static_cast<const Work*>(context))(i); }, &work);
  }

  /// Within run: waits until every thread is here, and starts claim() anew.
  void barrier();

  /// Within run: the next index that no thread has taken since the last barrier, 0, 1, 2, ..
  int64_t claim() { return next_.fetch_add(1, std::memory_order_relaxed); }

  /// The part [begin, end) of `count` things that is thread i's.
  struct Range {
    int64_t begin, end;
  };
  Range share(int64_t count, int i) const { return {count * i / size_, count * (i + 1) / size_}; }

 private:
  using Erased = void (*)(const void*, int);
  void run_erased(Erased work, const void* context);
  void serve(int i);

  int size_;
  Erased work_ = nullptr;
  const void* context_ = nullptr;
  bool stop_ = false;
  // Each on a cache line of its own.
  alignas(64) std::atomic<uint32_t> job_{0};         // counts jobs: a change is the call to work
  alignas(64) std::atomic<uint32_t> generation_{0};  // counts barriers passed
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  std::vector<std::thread> threads_;
};

}  // namespace gemma_torch::kernels
