// measure_capture FOLDER FILE [TOKENS TIMES DTYPE THREADS]: what capturing every resid_post to FILE costs over the same
// pass of the modules without it, and over the eager engine's prefill. Each capture is timed beside one of each, in
// turning order. On a machine that others use, the processor time of one thread says more than the clock.
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>
#include <fmt/format.h>
#include <time.h>

#include <algorithm>
#include <array>
#include <functional>

#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/engine/engine.h"
#include "gemma_torch/inspect/capture.h"
#include "gemma_torch/pretrained.h"

namespace {

using namespace gemma_torch;

struct Took {
  double wall = 0, cpu = 0;  // s
};

double now(clockid_t clock) {
  timespec time = {};
  ::clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

Took timed(const std::function<void()>& act) {
  const Took start{now(CLOCK_MONOTONIC), now(CLOCK_PROCESS_CPUTIME_ID)};
  act();
  return {now(CLOCK_MONOTONIC) - start.wall, now(CLOCK_PROCESS_CPUTIME_ID) - start.cpu};
}

std::string quartiles(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const auto n = values.size();
  return fmt::format(
      "{:.4f} ({:.4f} - {:.4f})", values[n / 2], values[n / 4], values[n - 1 - n / 4]);
}

void print(const std::string& what, const std::vector<Took>& took, const std::vector<Took>& over) {
  std::vector<double> wall, cpu;
  for (size_t i = 0; i < took.size(); ++i) {
    wall.push_back(took[i].wall / (over.empty() ? 1 : over[i].wall));
    cpu.push_back(took[i].cpu / (over.empty() ? 1 : over[i].cpu));
  }
  fmt::print("{:<26} {:<30} {}\n", what, quartiles(wall), quartiles(cpu));
}

void measure(const std::string& folder,
             const std::string& file,
             int64_t T,
             int64_t times,
             const std::string& dtype) {
  const auto loaded = load_pretrained(folder, {.dtype = parse_dtype(dtype, c10::kFloat)});
  std::vector<int64_t> ids = {2};
  for (int64_t i = 1; i < T; ++i) {
    ids.push_back(1000 + i * 7919 % 20'000);
  }
  auto model = loaded.model;
  const auto input = at::tensor(ids, at::kLong).unsqueeze(0);
  const auto engine = make_engine(model, {.kind = EngineKind::kEager, .capacity = T});
  const std::vector<std::function<void()>> ways = {
      [&] {
        const at::NoGradGuard no_grad;
        model->hidden(input);
      },
      [&] { capture(model, {ids}, {.sites = {"blocks.*.resid_post"}}, file); },
      [&] {
        engine->reset();
        engine->append(ids);
      }};
  std::array<std::vector<Took>, 3> took;
  for (int64_t round = -1; round < times; ++round) {  // the first warms up
    for (int64_t i = 0; i < 3; ++i) {
      const auto way = static_cast<size_t>((round + 1 + i) % 3);
      const auto one = timed(ways[way]);
      if (round >= 0) {
        took[way].push_back(one);
      }
    }
  }
  fmt::print("{} tokens, {}, {} threads, {} times: median (quartiles)\n",
             T,
             dtype,
             at::get_num_threads(),
             times);
  fmt::print("{:<26} {:<30} {}\n", "", "clock", "processor");
  print("modules, no cache (s)", took[0], {});
  print("capture of resid_post (s)", took[1], {});
  print("eager engine, prefill (s)", took[2], {});
  print("capture / modules", took[1], took[0]);
  print("capture / eager engine", took[1], took[2]);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3 || argc > 7) {
    fmt::print(stderr, "usage: measure_capture FOLDER FILE [TOKENS TIMES DTYPE THREADS]\n");
    return 2;
  }
  try {
    at::set_num_threads(argc > 6 ? std::stoi(argv[6]) : usable_cores());
    measure(argv[1],
            argv[2],
            argc > 3 ? std::stoll(argv[3]) : 512,
            argc > 4 ? std::stoll(argv[4]) : 21,
            argc > 5 ? argv[5] : "float32");
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "measure_capture: error: {}\n", error.what());
    return 1;
  }
}
