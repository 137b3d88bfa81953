#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "bench_plan.h"
#include "common.h"

namespace gemma_torch::apps {

/// How each test is run.
struct BenchHow {
  int repetitions = 5;
  bool profile = false;  // measure kernels too, in a run of their own
  bool hash = false;
  // What is read, depth first; none: any tokens, the same each time.
  std::vector<int64_t> ids = {};
};

struct BenchResult {
  std::vector<double> seconds;                     // of each repetition
  std::vector<double> first_token_seconds;         // of each repetition
  EngineReport engine;                             // at the middle of the generation
  int64_t peak_memory = 0;                         // bytes, of the process so far
  std::optional<int64_t> peak_device_memory = {};  // bytes, of a CUDA device
  std::optional<uint64_t> hash;                    // of the full head's logits after the last token
  std::vector<KernelTime> kernels;                 // of one repetition
  bool any_tokens = true;                          // what was read was no text
};

/// Runs tests on one model, and keeps the engine while the next test can use it.
class BenchRunner {
 public:
  /// `tests` are those to come. Throws: Error if one needs more than --ctx, or more tokens than were given.
  BenchRunner(const Pretrained& loaded,
              ModelOptions options,
              std::vector<BenchTest> tests,
              const BenchHow& how);

  /// One warm-up, which does not count, then the repetitions. `beside` is called before the first of them and after
  /// each.
  BenchResult run(const BenchTest& test, const std::function<void()>& beside);

 private:
  struct Sample {
    double seconds = 0;
    double first_token_seconds = 0;
  };

  void prepare(const BenchTest& test, bool profile);
  Sample once(const BenchTest& test);
  at::Tensor next_ids(int64_t count);
  void read(int64_t count, int64_t piece);
  int64_t capacity_for(const BenchTest& test) const;

  const Pretrained& loaded_;
  ModelOptions options_;
  std::vector<BenchTest> tests_;
  BenchHow how_;
  std::unique_ptr<Engine> engine_;
  BenchTest made_for_;
  bool profiles_ = false;
  int64_t taken_ = 0;  // of the ids given, since the engine began anew
};

}  // namespace gemma_torch::apps
