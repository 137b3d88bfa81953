#include "roofline.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/ones.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <barrier>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <exception>
#include <thread>

#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/base/memory.h"
#include "roofline_sums.h"

namespace gemma_torch::apps {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kBytes = size_t{512} << 20;  // far above any cache
constexpr uint64_t kWords = kBytes / sizeof(uint64_t);
constexpr double kFreshSeconds = 0.25;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The memory, all ones, and the threads that sum it.
class Sweep {
 public:
  // Seconds of one pass of every reading.
  std::vector<double> round(int threads) {
    const auto& all = readings();
    std::vector<double> seconds(all.size());
    std::vector<uint64_t> totals(static_cast<size_t>(threads));
    std::barrier together(threads);
    const auto work = [&](size_t id) {
      const auto share = kBytes / totals.size() / kReadingStep * kReadingStep;
      auto* const data = memory_.get() + id * share;
      const auto bytes = id + 1 == totals.size() ? kBytes - id * share : share;
      if (!filled_) {
        std::fill_n(reinterpret_cast<uint64_t*>(data), bytes / sizeof(uint64_t), uint64_t{1});
      }
      for (size_t i = 0; i < all.size(); ++i) {
        together.arrive_and_wait();
        const auto start = Clock::now();
        totals[id] += all[i].sum(data, bytes);
        together.arrive_and_wait();
        if (id == 0) {
          seconds[i] = seconds_since(start);
        }
      }
    };
    run(totals.size(), work);
    filled_ = true;
    uint64_t total = 0;
    for (const auto sum : totals) {
      total += sum;
    }
    check(total == kWords * all.size(),  // every word was read
          "[roofline] sum: expected {}, got {}",
          kWords * all.size(),
          total);
    return seconds;
  }

 private:
  template <typename Work>
  static void run(size_t threads, const Work& work) {
    std::vector<std::thread> others;
    for (size_t id = 1; id < threads; ++id) {
      others.emplace_back(work, id);
    }
    work(size_t{0});
    for (auto& other : others) {
      other.join();
    }
  }

  std::shared_ptr<std::byte> memory_ = large_pages(kBytes);
  bool filled_ = false;
};

// False at the end of the pipe: the other process is gone.
bool read_all(int descriptor, void* data, size_t bytes) {
  auto* next = static_cast<char*>(data);
  while (bytes > 0) {
    const auto got = ::read(descriptor, next, bytes);
    if (got < 0 && errno == EINTR) {
      continue;
    }
    if (got <= 0) {
      return false;
    }
    next += got;
    bytes -= static_cast<size_t>(got);
  }
  return true;
}

// The requests and replies are shorter than PIPE_BUF: a pipe takes them whole or not at all.
bool write_all(int descriptor, const void* data, size_t bytes) {
  ssize_t put = 0;
  do {
    put = ::write(descriptor, data, bytes);
  } while (put < 0 && errno == EINTR);
  return put == static_cast<ssize_t>(bytes);
}

// The process's work: a request is a number of threads, the reply a double for each reading.
int serve(int requests, int replies) {
  try {
    Sweep sweep;
    for (int threads = 0; read_all(requests, &threads, sizeof threads);) {
      const auto seconds = sweep.round(threads);
      if (!write_all(replies, seconds.data(), seconds.size() * sizeof(double))) {
        return 0;
      }
    }
    return 0;
  } catch (const std::exception&) {
    return 1;  // the other side sees the closed pipe
  }
}

Round device_round(const at::Tensor& words, c10::Device device) {
  words.sum();  // a first one loads the kernel
  synchronize(device);
  const auto start = Clock::now();
  const auto total = static_cast<uint64_t>(words.sum().item<int64_t>());
  const auto seconds = seconds_since(start);
  check(total == kWords, "[roofline] sum: expected {}, got {}", kWords, total);
  return {seconds};
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const auto half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

}  // namespace

Roofline best_median(const std::vector<Round>& rounds) {
  const auto count = rounds.empty() ? 0 : rounds[0].size();
  Roofline best;
  for (size_t i = 0; i < count; ++i) {
    std::vector<double> seconds;
    for (const auto& round : rounds) {
      seconds.push_back(round[i]);
    }
    const auto bytes = static_cast<double>(kBytes);
    const auto speed = bytes / median(seconds);
    if (speed > best.bytes_per_second) {
      const bool cpu = count == readings().size();
      best = {speed, cpu ? reading_name(readings()[i]) : "sum on the device", seconds, bytes};
    }
  }
  return best;
}

RooflineMeter::RooflineMeter() {
  std::array<int, 2> to = {}, from = {};
  check(::pipe(to.data()) == 0 && ::pipe(from.data()) == 0,
        "[roofline] pipe: {}",
        std::strerror(errno));
  process_ = ::fork();
  check(process_ >= 0, "[roofline] fork: {}", std::strerror(errno));
  if (process_ == 0) {
    ::close(to[1]);
    ::close(from[0]);
    ::_exit(serve(to[0], from[1]));  // without this program's own clean-up
  }
  ::close(to[0]);
  ::close(from[1]);
  requests_ = to[1];
  replies_ = from[0];
}

RooflineMeter::~RooflineMeter() {
  ::close(requests_);  // the process reads the end of the pipe, and ends
  ::close(replies_);
  while (::waitpid(process_, nullptr, 0) < 0 && errno == EINTR) {
  }
}

const Round& RooflineMeter::now(c10::Device device, int threads) {
  if (threads != last_threads_ || seconds_since(last_time_) > kFreshSeconds) {
    last_ = measure(device, threads);
    last_threads_ = threads;
    last_time_ = Clock::now();
  }
  return last_;
}

Round RooflineMeter::measure(c10::Device device, int threads) {
  if (!device.is_cpu()) {
    const auto how = at::TensorOptions(at::kLong).device(device);
    return device_round(at::ones({static_cast<int64_t>(kWords)}, how), device);
  }
  Round seconds(readings().size());
  check(write_all(requests_, &threads, sizeof threads) &&
            read_all(replies_, seconds.data(), seconds.size() * sizeof(double)),
        "[roofline] the process that measures it has died: expected {} MiB and {} threads",
        kBytes >> 20,
        threads);
  return seconds;
}

}  // namespace gemma_torch::apps
