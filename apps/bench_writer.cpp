#include "bench_writer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>

#include "common.h"
#include "gemma_torch/base/error.h"

namespace gemma_torch::apps {
namespace {

using Record = nlohmann::ordered_json;

// Columns are counted in characters: of UTF-8, every byte that begins one.
std::string padded(const std::string& text, int width) {
  const auto length = std::count_if(
      text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) >> 6) != 2; });
  const auto missing = std::max<int64_t>(0, std::abs(width) - length);
  const std::string blanks(static_cast<size_t>(missing), ' ');
  return width < 0 ? text + blanks : blanks + text;
}

std::string csv_cell(const Record& value) {
  const auto plain = value.is_string()    ? value.get<std::string>()
                     : value.is_null()    ? ""
                     : value.is_boolean() ? (value.get<bool>() ? "1" : "0")
                                          : value.dump();
  std::string cell = "\"";
  for (const char c : plain) {
    cell += c == '"' ? "\"\"" : std::string(1, c);
  }
  return cell + "\"";
}

std::string text(const Record& record, const char* field) {
  const auto& value = record[field];
  return value.is_string() ? value.get<std::string>() : value.is_null() ? "" : value.dump();
}

// A number times `factor` with `digits` behind the point; nothing where the field is null.
std::string number(const Record& value, double factor = 1, int digits = 1) {
  return value.is_null() ? "" : fmt::format("{:.{}f}", value.get<double>() * factor, digits);
}

std::string record_name(const Record& record) {
  return test_name({.n_prompt = record["n_prompt"].get<int64_t>(),
                    .n_gen = record["n_gen"].get<int64_t>(),
                    .n_depth = record["n_depth"].get<int64_t>()});
}

std::string rate(const Record& record) {
  return number(record["avg_ts"], 1, 2) + " ± " + number(record["stddev_ts"], 1, 2);
}

std::string rate_range(const Record& record) {
  return fmt::format("{} ({}-{})",
                     number(record["median_ts"]),
                     number(record["min_ts"]),
                     number(record["max_ts"]));
}

// "93 % of 36.8", with a mark where that cannot be.
std::string share(const Record& record) {
  const auto percent = number(record["roofline_share"], 100, 0);
  const char* mark = record["roofline_exceeded"].get<bool>() ? "!" : "";
  return percent.empty() ? "" : percent + " %" + mark + " of " + number(record["roofline_gb_s"]);
}

std::string kernel_lines(const Record& record) {
  std::string lines = fmt::format("\n| {:<26} | {:>12} | {:>11} | {:>6} |\n",
                                  "kernel, " + record_name(record),
                                  "us per token",
                                  "calls",
                                  "share");
  lines += fmt::format("| {:-<26} | {:->11}: | {:->10}: | {:->5}: |\n", "", "", "", "");
  for (const auto& kernel : record["profile"]) {
    lines += fmt::format("| {:<26} | {:>12} | {:>11} | {:>6} |\n",
                         text(kernel, "kernel"),
                         number(kernel["us_per_token"]),
                         number(kernel["calls_per_token"]),
                         number(kernel["share"], 100, 0) + " %");
  }
  return lines;
}

}  // namespace

BenchWriter::BenchWriter(std::string format) : format_(std::move(format)) {
  check(format_ == "md" || format_ == "json" || format_ == "jsonl" || format_ == "csv",
        "[bench] --output: expected md, json, jsonl or csv, got {}",
        format_);
}

void BenchWriter::begin(const std::vector<BenchTest>& tests, bool hash) {
  const auto field = [](const char* name) {
    return [name](const Record& record) { return text(record, name); };
  };
  const auto scaled = [](const char* name, double factor, const char* unit, int digits = 1) {
    return [=](const Record& record) {
      const auto shown = number(record[name], factor, digits);
      return shown.empty() ? shown : shown + unit;
    };
  };
  const auto unlike_default = [&](int64_t BenchTest::* member) {
    return std::any_of(tests.begin(), tests.end(), [member](const BenchTest& test) {
      return test.*member != BenchTest{}.*member;
    });
  };
  columns_ = {{"model", -30, field("model_type")},
              {"size", 10, scaled("model_size", 1.0 / (1 << 20), " MiB", 2)},
              {"params", 10, scaled("model_n_params", 1e-6, " M", 2)},
              {"backend", -10, field("backends")},
              {"threads", 7, field("n_threads")}};
  if (unlike_default(&BenchTest::n_batch)) {
    columns_.push_back({"n_batch", 7, field("n_batch")});
  }
  if (unlike_default(&BenchTest::n_ubatch)) {
    columns_.push_back({"n_ubatch", 8, field("n_ubatch")});
  }
  columns_.push_back({"engine", -6, field("engine")});
  columns_.push_back({"isa", -6, field("isa")});
  columns_.push_back({"quant", -5, field("quant")});
  if (unlike_default(&BenchTest::n_sequences)) {
    columns_.push_back({"rows", 4, field("n_sequences")});
  }
  if (unlike_default(&BenchTest::top_k)) {
    columns_.push_back({"top-k", 5, field("top_k")});
  }
  columns_.push_back({"test", 15, record_name});
  columns_.push_back({"t/s", 20, rate});
  columns_.push_back({"median (range)", 25, rate_range});
  columns_.push_back({"MB/token", 8, scaled("bytes_per_token", 1e-6, "")});
  columns_.push_back({"GB/s", 6, scaled("achieved_gb_s", 1, "")});
  columns_.push_back({"of roofline", 13, share});
  columns_.push_back({"first token", 11, scaled("time_to_first_token_ms", 1, " ms")});
  columns_.push_back({"peak", 8, scaled("peak_memory_bytes", 1e-6, " MB", 0)});
  if (hash) {
    columns_.push_back({"logits hash", -16, field("logits_hash")});
  }
}

void BenchWriter::add(const Record& record) {
  if (format_ == "jsonl") {
    print_text(record.dump() + "\n");
  } else if (format_ == "csv") {
    add_csv(record);
  } else if (format_ == "md") {
    add_row(record);
  }
  records_.push_back(record);
}

void BenchWriter::add_row(const Record& record) {
  std::string lines;
  if (records_.empty()) {
    std::string rule;
    for (const auto& [name, width, cell] : columns_) {
      lines += "| " + padded(name, width) + " ";
      const std::string dashes(static_cast<size_t>(std::abs(width) - 1), '-');
      rule += "| " + dashes + (width < 0 ? "- " : ": ");
    }
    lines += "|\n" + rule + "|\n";
  }
  for (const auto& [name, width, cell] : columns_) {
    lines += "| " + padded(cell(record), width) + " ";
  }
  print_text(lines + "|\n");
}

void BenchWriter::add_csv(const Record& record) {
  std::string names, cells;
  for (const auto& [key, value] : record.items()) {
    if (!value.is_array()) {
      names += (names.empty() ? "" : ",") + key;
      cells += (cells.empty() ? "" : ",") + csv_cell(value);
    }
  }
  print_text((records_.empty() ? names + "\n" : "") + cells + "\n");
}

void BenchWriter::finish() {
  if (format_ == "json") {
    print_text(records_.dump(2) + "\n");
  } else if (format_ == "md") {
    for (const auto& record : records_) {
      if (!record["profile"].empty()) {
        print_text(kernel_lines(record));
      }
    }
  }
}

}  // namespace gemma_torch::apps
