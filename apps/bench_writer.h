#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench_plan.h"

namespace gemma_torch::apps {

/// Writes the records of tests as md, json, jsonl or csv on standard output: each as it comes, but
/// for json, which is one array at the end. Tables of kernels follow the tests in md; csv, as
/// llama-bench's, leaves out what is a list.
class BenchWriter {
 public:
  explicit BenchWriter(std::string format);  // Throws: Error for another format

  /// `tests` and `hash` decide which columns a table needs.
  void begin(const std::vector<BenchTest>& tests, bool hash);
  void add(const nlohmann::ordered_json& record);
  void finish();

  const std::string& format() const { return format_; }

 private:
  struct Column {
    std::string name;
    int width;  // negative: to the left
    std::function<std::string(const nlohmann::ordered_json&)> cell;
  };

  void add_row(const nlohmann::ordered_json& record);
  void add_csv(const nlohmann::ordered_json& record);

  std::string format_;
  std::vector<Column> columns_;
  nlohmann::ordered_json records_ = nlohmann::ordered_json::array();
};

}  // namespace gemma_torch::apps
