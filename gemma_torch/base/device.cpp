#include "gemma_torch/base/device.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <sys/resource.h>
#include <torch/cuda.h>
#include <torch/mps.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// cgroup v2 says "quota period" or "max period" in microseconds; 0 where there is no limit.
int cgroup_cores() {
  std::istringstream words(first_line("/sys/fs/cgroup/cpu.max"));
  double quota = 0;
  double period = 0;
  return words >> quota >> period && quota > 0 && period > 0
             ? std::max(1, static_cast<int>(quota / period + 0.5))
             : 0;
}

}  // namespace

c10::Device parse_device(const std::string& name) {
  const bool has_cuda = torch::cuda::is_available();
  const bool has_mps = torch::mps::is_available();
  if (name == "auto") {
    return has_cuda ? c10::Device("cuda:0") : has_mps ? c10::Device("mps") : c10::Device("cpu");
  }
  const bool cuda = name == "cuda" || name.starts_with("cuda:");
  check(name == "cpu" || name == "mps" || cuda,
        "[device] expected auto, cpu, cuda or mps, got {}",
        name);
  check(!cuda || has_cuda, "[device] {}: no CUDA device in this LibTorch on this machine", name);
  check(name != "mps" || has_mps, "[device] mps: no Apple GPU in this LibTorch on this machine");
  const bool numbered = cuda && name.size() > 5;
  check(!numbered || name.find_first_not_of("0123456789", 5) == std::string::npos,
        "[device] expected cuda:N, got {}",
        name);
  const int index = numbered ? std::stoi(name.substr(5, 4)) : 0;
  check(!cuda || index < static_cast<int>(torch::cuda::device_count()),
        "[device] {}: this machine has {} CUDA devices",
        name,
        static_cast<int>(torch::cuda::device_count()));
  return cuda ? c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index)) : c10::Device(name);
}

c10::ScalarType parse_dtype(const std::string& name, c10::ScalarType automatic) {
  check(name != "float16" && name != "half",
        "[dtype] float16: Gemma's activations overflow it. Hint: use bfloat16");
  check(name == "auto" || name == "float32" || name == "bfloat16",
        "[dtype] expected auto, float32 or bfloat16, got {}",
        name);
  return name == "float32" ? c10::kFloat : name == "bfloat16" ? c10::kBFloat16 : automatic;
}

std::string dtype_name(c10::ScalarType dtype) {
  return dtype == c10::kFloat      ? "float32"
         : dtype == c10::kBFloat16 ? "bfloat16"
                                   : std::string(c10::toString(dtype));
}

void synchronize(c10::Device device) {
  if (device.is_cuda()) {
    torch::cuda::synchronize(device.index());
  } else if (device.is_mps()) {
    torch::mps::synchronize();
  }
}

int usable_cores() {
  int cores = static_cast<int>(std::thread::hardware_concurrency());
#ifdef __linux__
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    std::set<std::string> physical;  // hyper-threads of one core name the same siblings
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &set)) {
        const auto siblings = first_line(
            fmt::format("/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list", cpu));
        physical.insert(siblings.empty() ? std::to_string(cpu) : siblings);
      }
    }
    cores = static_cast<int>(physical.size());
  }
#endif
  const int limit = cgroup_cores();
  return std::max(1, limit > 0 ? std::min(cores, limit) : cores);
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("flags")) {
      std::istringstream words(line);
      const std::set<std::string> flags{std::istream_iterator<std::string>(words), {}};
      for (const char* name : {"avx2",
                               "fma",
                               "f16c",
                               "avx512f",
                               "avx512bw",
                               "avx512_vnni",
                               "avx512_bf16",
                               "avx_vnni",
                               "amx_bf16",
                               "amx_int8"}) {
        if (flags.contains(name)) {
          found.emplace_back(name);
        }
      }
      break;
    }
  }
#elif defined(__aarch64__)
  found.emplace_back("neon");
#endif
  return found;
}

int64_t peak_memory_bytes() {
  struct rusage usage = {};
  ::getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
  return usage.ru_maxrss;
#else
  return int64_t{1024} * usage.ru_maxrss;  // Linux counts kibibytes
#endif
}

std::optional<int64_t> peak_device_memory_bytes(c10::Device device) {
  if (!device.is_cuda()) {
    return {};
  }
  const auto stats = c10::getDeviceAllocator(device.type())->getDeviceStats(device.index());
  constexpr auto kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  return stats.allocated_bytes[kAll].peak;
}

void reset_peak_device_memory(c10::Device device) {
  if (device.is_cuda()) {
    c10::getDeviceAllocator(device.type())->resetPeakStats(device.index());
  }
}

}  // namespace gemma_torch
