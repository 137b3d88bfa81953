#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace gemma_torch::apps {

/// What is run: each of `n_sequences` rows has `n_depth` tokens in the cache, then reads `n_prompt`
/// and generates `n_gen`.
struct BenchTest {
  int64_t n_prompt = 0;
  int64_t n_gen = 0;
  int64_t n_depth = 0;
  int64_t n_batch = 2048;  // most tokens of a row given to the engine at once
  int64_t n_ubatch = 512;  // most of those that go through the model in one pass
  int64_t n_sequences = 1;
  int64_t n_threads = 1;
  int64_t top_k = 1;  // 1: greedy, else a draw from the k most likely
};

/// "pp512", "tg128 @ d2048", "pp512+tg128".
std::string test_name(const BenchTest& test);

/// The flags as given, each as often as given: lists of numbers and ranges.
struct BenchLists {
  std::vector<std::string> prompts = {"512"};
  std::vector<std::string> gens = {"128"};
  std::vector<std::string> pairs = {};  // "512,128" each
  std::vector<std::string> depths = {"0"};
  std::vector<std::string> batches = {"2048"};
  std::vector<std::string> ubatches = {"512"};
  std::vector<std::string> threads = {};  // none: usable physical cores
  std::vector<std::string> sequences = {"1"};
  std::vector<std::string> top_ks = {"1"};
};

/// Every combination of batch, ubatch, threads, depth, rows and top-k, the first changing least
/// often, as in llama-bench; for each all prompts, then all generations, then all pairs. Zero
/// lengths are left out.
/// Throws: Error naming the flag, or if no test is left.
std::vector<BenchTest> plan(const BenchLists& lists);

}  // namespace gemma_torch::apps
