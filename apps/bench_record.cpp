#include "bench_record.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>

#include "common.h"
#include "gemma_torch/base/error.h"

namespace gemma_torch::apps {
namespace {

using Record = nlohmann::ordered_json;

// Reads a number at the start of `rest` and takes it away; -1 if there is none.
int64_t take_number(std::string_view& rest) {
  int64_t value = -1;
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), value);
  if (error != std::errc() || value < 0) {
    return -1;
  }
  rest.remove_prefix(static_cast<size_t>(end - rest.data()));
  return value;
}

void add_range(std::string_view word, std::vector<int64_t>& values, const std::string& flag) {
  auto rest = word;
  const auto bad = [&](bool is_bad) {
    check(!is_bad,
          "[bench] {}: expected numbers such as 512, 1,2,4, 128-512+128 or 1-64*2, got \"{}\"",
          flag,
          word);
  };
  const auto first = take_number(rest);
  auto last = first;
  int64_t step = 1;
  bool multiply = false;
  bad(first < 0);
  if (rest.starts_with('-')) {
    rest.remove_prefix(1);
    last = take_number(rest);
    bad(last < first);
    if (rest.starts_with('+') || rest.starts_with('*')) {
      multiply = rest.front() == '*';
      rest.remove_prefix(1);
      step = take_number(rest);
      bad(step < (multiply ? 2 : 1) || (multiply && first == 0));
    }
  }
  bad(!rest.empty());
  for (int64_t value = first; value <= last; value = multiply ? value * step : value + step) {
    values.push_back(value);
  }
}

std::string csv_cell(const nlohmann::ordered_json& value) {
  std::string cell = "\"";
  for (const char c : value.is_string() ? value.get<std::string>()
                      : value.is_null() ? ""
                                        : value.dump()) {
    cell += c == '"' ? "\"\"" : std::string(1, c);
  }
  return cell + "\"";
}

// llama-bench leaves the samples out of csv too.
void print_csv(const Record& record, bool header) {
  std::string names, cells;
  for (const auto& [key, value] : record.items()) {
    if (!value.is_array()) {
      names += (names.empty() ? "" : ",") + key;
      cells += (cells.empty() ? "" : ",") + csv_cell(value);
    }
  }
  print_text((header ? names + "\n" : "") + cells + "\n");
}

std::string number(const Record& value, const char* unit = "") {
  return value.is_null() ? "" : fmt::format("{:.1f}{}", value.get<double>(), unit);
}

void print_markdown(const Record& record, bool header) {
  if (header) {
    print_text(
        "| model                          |       size |     params | backend    | threads | "
        "engine |"
        "              test |                  t/s | MB/token |   GB/s | of roofline | first token "
        "|\n"
        "| ------------------------------ | ---------: | ---------: | ---------- | ------: | "
        "------ |"
        " ----------------: | -------------------: | -------: | -----: | ----------: | ----------: "
        "|\n");
  }
  const BenchTest test{record["n_prompt"].get<int64_t>(),
                       record["n_gen"].get<int64_t>(),
                       record["n_depth"].get<int64_t>()};
  const auto& bytes = record["bytes_per_token"];
  const auto& achieved = record["achieved_gb_s"];
  const auto part =
      achieved.is_null()
          ? std::string()
          : fmt::format("{:.0f} %",
                        100 * achieved.get<double>() / record["roofline_gb_s"].get<double>());
  print_text(fmt::format(
      "| {:<30} | {:>10} | {:>10} | {:<10} | {:>7} | {:<6} | {:>17} | {:>20} | {:>8} | {:>6} | "
      "{:>11} | {:>11} |\n",
      record["model_type"].get<std::string>(),
      fmt::format("{:.2f} MiB", record["model_size"].get<double>() / (1 << 20)),
      fmt::format("{:.2f} M", record["model_n_params"].get<double>() / 1e6),
      record["backends"].get<std::string>(),
      record["n_threads"].get<int>(),
      record["engine"].get<std::string>(),
      test_name(test),
      fmt::format(
          "{:.2f} ± {:.2f}", record["avg_ts"].get<double>(), record["stddev_ts"].get<double>()),
      bytes.is_null() ? "" : fmt::format("{:.1f}", bytes.get<double>() / 1e6),
      number(achieved),
      part,
      number(record["time_to_first_token_ms"], " ms")));
}

}  // namespace

std::string test_name(const BenchTest& test) {
  std::string name = test.n_prompt > 0 ? fmt::format("pp{}", test.n_prompt) : "";
  if (test.n_gen > 0) {
    name += fmt::format("{}tg{}", name.empty() ? "" : "+", test.n_gen);
  }
  return test.n_depth > 0 ? fmt::format("{} @ d{}", name, test.n_depth) : name;
}

std::vector<int64_t> parse_range(const std::string& flag, const std::string& text) {
  std::vector<int64_t> values;
  size_t start = 0;
  while (start <= text.size()) {
    const auto end = std::min(text.find(',', start), text.size());
    add_range(std::string_view(text).substr(start, end - start), values, flag);
    start = end + 1;
  }
  return values;
}

BenchTest parse_pair(const std::string& text) {
  const auto numbers = parse_range("-pg", text);
  check(numbers.size() == 2 && numbers[0] >= 1 && numbers[1] >= 1,
        "[bench] -pg: expected two numbers such as 512,128, got \"{}\"",
        text);
  return {.n_prompt = numbers[0], .n_gen = numbers[1]};
}

Spread spread(const std::vector<double>& samples) {
  const auto n = static_cast<double>(samples.size());
  double sum = 0;
  for (const auto sample : samples) {
    sum += sample;
  }
  double squares = 0;
  for (const auto sample : samples) {
    squares += (sample - sum / n) * (sample - sum / n);
  }
  return {sum / n, samples.size() > 1 ? std::sqrt(squares / (n - 1)) : 0.0};
}

BenchWriter::BenchWriter(std::string format) : format_(std::move(format)) {
  check(format_ == "md" || format_ == "json" || format_ == "jsonl" || format_ == "csv",
        "[bench] --output: expected md, json, jsonl or csv, got {}",
        format_);
}

void BenchWriter::add(const Record& record) {
  if (format_ == "json") {
    records_.push_back(record);
  } else if (format_ == "jsonl") {
    print_text(record.dump() + "\n");
  } else if (format_ == "csv") {
    print_csv(record, !headed_);
  } else {
    print_markdown(record, !headed_);
  }
  headed_ = true;
}

void BenchWriter::finish() {
  if (format_ == "json") {
    print_text(records_.dump(2) + "\n");
  }
}

}  // namespace gemma_torch::apps
