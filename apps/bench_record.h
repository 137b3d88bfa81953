#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace gemma_torch::apps {

/// What was run: `n_depth` tokens are in the cache, then `n_prompt` are read and `n_gen` generated.
struct BenchTest {
  int64_t n_prompt = 0;
  int64_t n_gen = 0;
  int64_t n_depth = 0;
};

/// "pp512", "tg128 @ d2048", "pp512+tg128".
std::string test_name(const BenchTest& test);

/// "512", "1,2,4", "128-512+128" or "1-64*2", as llama-bench reads them.
/// Throws: Error naming the flag.
std::vector<int64_t> parse_range(const std::string& flag, const std::string& text);

/// "512,128" as a prompt and the tokens generated after it. Throws: Error.
BenchTest parse_pair(const std::string& text);

/// Mean and sample standard deviation; the latter 0 of one sample.
struct Spread {
  double mean = 0;
  double stddev = 0;
};
Spread spread(const std::vector<double>& samples);

/// Writes records (llama-bench's field names, and ours after them) as md, json, jsonl or csv on
/// standard output: each as it comes, but for json, which is one array at the end.
class BenchWriter {
 public:
  explicit BenchWriter(std::string format);  // Throws: Error for another format
  void add(const nlohmann::ordered_json& record);
  void finish();

 private:
  std::string format_;
  nlohmann::ordered_json records_ = nlohmann::ordered_json::array();
  bool headed_ = false;
};

}  // namespace gemma_torch::apps
