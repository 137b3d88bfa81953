// soak FOLDER SECONDS [SEED]: random prompts, samplers, rewinds and restarts on the fused engine of a model folder, in
// one process, and its memory meanwhile. Fails if memory after the first tenth of the time grows by more than 16 MB.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <random>
#include <string>

#include "gemma_torch/base/error.h"
#include "gemma_torch/engine/fused.h"
#include "gemma_torch/pretrained.h"

using namespace gemma_torch;

namespace {

using Clock = std::chrono::steady_clock;

double resident_mb() {
  std::ifstream file("/proc/self/statm");
  double all = 0, resident = 0;
  file >> all >> resident;
  return resident * static_cast<double>(::sysconf(_SC_PAGESIZE)) / 1e6;
}

class Soak {
 public:
  Soak(Engine& engine, uint64_t seed) : engine_(engine), random_(seed) {}

  void step() {
    switch (below(6)) {
      case 0:
        engine_.reset();
        break;
      case 1:  // a short way back, which the rings always hold
        engine_.rewind(std::max<int64_t>(0, engine_.position() - below(20)));
        break;
      default:
        break;
    }
    // Mostly short prompts, now and then one of several chunks.
    const auto length = 1 + below(below(8) == 0 ? 1500 : 60);
    const auto count = 1 + below(60);
    if (engine_.position() + length + count > engine_.capacity()) {
      engine_.reset();
    }
    std::vector<int64_t> ids;
    for (int64_t i = 0; i < length; ++i) {
      ids.push_back(below(engine_.vocab_size()));
    }
    engine_.append(ids);
    prompt_tokens += length;
    engine_.decode(count, sampling(), [&](int64_t /*row*/, int64_t id) {
      check(id >= 0 && id < engine_.vocab_size(),
            "[soak] token id: expected 0 to {}, got {}",
            engine_.vocab_size() - 1,
            id);
      ++new_tokens;
      return true;
    });
  }

  int64_t prompt_tokens = 0, new_tokens = 0, steps = 0;

 private:
  int64_t below(int64_t n) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(n)); }

  Sampling sampling() {
    Sampling s{.temperature = 0.5 + 0.1 * static_cast<double>(below(10)), .seed = random_()};
    switch (below(6)) {
      case 0:
        s.temperature = 0;
        break;
      case 1:
        s.top_p = 0.9;  // all logits
        break;
      default:
        s.top_k = 1 + below(300);
        s.top_p = below(2) == 0 ? 1.0 : 0.9;
        s.min_p = below(3) == 0 ? 0.05 : 0.0;
        break;
    }
    s.repetition_penalty = below(3) == 0 ? 1.2 : 1.0;
    return s;
  }

  Engine& engine_;
  std::mt19937_64 random_;
};

void run(const std::string& folder, double seconds, uint64_t seed) {
  const auto loaded = load_pretrained(folder);
  FusedEngine engine(loaded.model, {.capacity = 4096});
  Soak soak(engine, seed);
  const auto start = Clock::now();
  const auto since_start = [&] {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  double settled = 0, most = 0, told = 0;
  while (since_start() < seconds) {
    soak.step();
    ++soak.steps;
    const double now = resident_mb();
    if (since_start() < seconds / 10) {
      settled = std::max(settled, now);
    }
    most = std::max(most, now);
    if (since_start() > told + 30) {
      told = since_start();
      fmt::print(stderr, "{:.0f} s: {} new tokens, {:.0f} MB\n", told, soak.new_tokens, now);
    }
  }
  fmt::print(
      "{} rounds, {} prompt and {} new tokens in {:.0f} s; memory {:.0f} MB after a tenth of it, "
      "at most {:.0f}\n",
      soak.steps,
      soak.prompt_tokens,
      soak.new_tokens,
      since_start(),
      settled,
      most);
  check(most <= settled + 16,
        "[soak] memory: expected at most {:.0f} MB, got {:.0f}",
        settled + 16,
        most);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    check(argc == 3 || argc == 4, "usage: soak FOLDER SECONDS [SEED]");
    run(argv[1], std::stod(argv[2]), argc == 4 ? std::stoull(argv[3]) : 1);
  } catch (const std::exception& error) {
    fmt::print(stderr, "soak: error: {}\n", error.what());
    return 1;
  }
}
