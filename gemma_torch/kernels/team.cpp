#include "gemma_torch/kernels/team.h"

#include <chrono>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace gemma_torch::kernels {
namespace {

using Clock = std::chrono::steady_clock;

// A token of this model has some 75 barriers 20 to 200 microseconds apart.
constexpr auto kSpin = std::chrono::microseconds(20);
// Longer than a sampler takes between two tokens, shorter than anyone would call idle.
constexpr auto kYield = std::chrono::milliseconds(2);

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins, then yields, until `done`; gives up after `limit`, if that is not zero. The clock is read rarely.
template <typename Done>
bool wait_until(const Done& done, Clock::duration limit) {
  for (int i = 0; i < 64; ++i) {
    if (done()) {
      return true;
    }
    pause();
  }
  const auto start = Clock::now();
  for (;;) {
    const auto waited = Clock::now() - start;
    if (limit != Clock::duration::zero() && waited > limit) {
      return done();
    }
    const bool spin = waited < kSpin;
    for (int i = 0; i < (spin ? 16 : 1); ++i) {
      if (done()) {
        return true;
      }
      spin ? pause() : std::this_thread::yield();
    }
  }
}

void pin_to_core(std::thread::native_handle_type thread, int index) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (::sched_getaffinity(0, sizeof allowed, &allowed) != 0) {
    return;
  }
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed) && index-- == 0) {
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(cpu, &one);
      ::pthread_setaffinity_np(thread, sizeof one, &one);
      return;
    }
  }
#else
  (void)thread;
  (void)index;
#endif
}

}  // namespace

Team::Team(int threads, bool pin) : size_(threads) {
  for (int i = 1; i < size_; ++i) {
    threads_.emplace_back([this, i] { serve(i); });
    if (pin) {
      pin_to_core(threads_.back().native_handle(), i);
    }
  }
}

Team::~Team() {
  stop_ = true;
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  for (auto& thread : threads_) {
    thread.join();
  }
}

void Team::run_erased(Erased work, const void* context) {
  next_.store(0, std::memory_order_relaxed);
  if (size_ == 1) {
    work(context, 0);
    return;
  }
  work_ = work;
  context_ = context;
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();  // costs nothing while none sleeps
  work(context, 0);
  barrier();
}

void Team::serve(int i) {
  for (uint32_t seen = 0;;) {
    const auto called = [&] { return job_.load(std::memory_order_acquire) != seen; };
    while (!wait_until(called, kYield)) {
      job_.wait(seen, std::memory_order_acquire);
    }
    ++seen;
    if (stop_) {
      return;
    }
    work_(context_, i);
    barrier();
  }
}

void Team::barrier() {
  if (size_ == 1) {
    next_.store(0, std::memory_order_relaxed);
    return;
  }
  const auto generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  wait_until([&] { return generation_.load(std::memory_order_acquire) != generation; },
             Clock::duration::zero());
}

}  // namespace gemma_torch::kernels
