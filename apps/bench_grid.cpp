#include "bench_grid.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <vector>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "page.h"

namespace gemma_torch::apps {
namespace {

using Record = nlohmann::ordered_json;
using Words = std::vector<std::string>;

struct Row {
  std::string device;  // as --device has it
  std::string mode;
  Words flags;         // of gemma bench
  std::string absent;  // why it cannot even be tried
};

std::vector<Row> rows(const GridOptions& options) {
  std::vector<Row> all;
  for (const char* device : {"cpu", "cuda", "mps"}) {
    all.push_back({device, "no cache", {"--engine", "eager", "--no-cache"}, {}});
    all.push_back(
        {device, "no cache, compiled (traced)", {"--engine", "traced", "--no-cache"}, {}});
    all.push_back({device, "KV cache", {"--engine", "eager"}, {}});
    all.push_back({device, "KV cache, compiled (traced)", {"--engine", "traced"}, {}});
    if (device == std::string("cpu")) {
      all.push_back(
          {device, "no cache, compiled (fused)", {"--engine", "fused", "--no-cache"}, {}});
      all.push_back({device, "KV cache, compiled (fused)", {"--engine", "fused"}, {}});
      all.push_back({device, "fused, int8", {"--engine", "fused", "--quant", "int8"}, {}});
      const bool given = !options.small_model.empty();
      all.push_back({device,
                     "fused, small",
                     {"--engine", "fused", "-m", options.small_model},
                     given ? "" : "no --small-model FOLDER of gemma quantize was given"});
    }
    if (device == std::string("cuda")) {
      all.push_back({device, "graph", {"--engine", "graph"}, {}});
    }
  }
  for (auto& row : all) {
    if (std::find(row.flags.begin(), row.flags.end(), "-m") == row.flags.end()) {
      row.flags.insert(row.flags.end(), {"-m", model_path(options.model.model)});
    }
  }
  return all;
}

struct Finished {
  int code;
  std::string out, error;
};

std::string read_descriptor(int descriptor) {
  std::string text;
  char piece[4096];
  for (;;) {
    const auto got = ::read(descriptor, piece, sizeof piece);
    if (got < 0 && errno == EINTR) {
      continue;
    }
    if (got <= 0) {
      return text;
    }
    text.append(piece, static_cast<size_t>(got));
  }
}

// Runs a program to its end. Its errors go through a file, so that neither stream can fill up unread.
Finished run_program(const Words& words) {
  std::vector<char*> arguments;
  for (const auto& word : words) {
    arguments.push_back(const_cast<char*>(word.c_str()));
  }
  arguments.push_back(nullptr);
  int out[2];
  check(::pipe(out) == 0, "[grid] pipe: {}", std::strerror(errno));
  std::FILE* const errors = std::tmpfile();
  check(errors != nullptr, "[grid] temporary file: {}", std::strerror(errno));
  const auto process = ::fork();
  check(process >= 0, "[grid] fork: {}", std::strerror(errno));
  if (process == 0) {
    ::dup2(out[1], STDOUT_FILENO);
    ::dup2(::fileno(errors), STDERR_FILENO);
    ::close(out[0]);
    ::close(out[1]);
    ::execv(arguments[0], arguments.data());
    ::_exit(127);
  }
  ::close(out[1]);
  Finished done{0, read_descriptor(out[0]), {}};
  ::close(out[0]);
  int status = 0;
  while (::waitpid(process, &status, 0) < 0 && errno == EINTR) {
  }
  done.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  std::rewind(errors);
  done.error = read_descriptor(::fileno(errors));
  std::fclose(errors);
  return done;
}

// "[device] ..", the last error of a run that failed.
std::string reason_of(const Finished& done) {
  constexpr std::string_view kMark = "gemma: error: ";
  const auto at = done.error.rfind(kMark);
  if (at == std::string::npos) {
    return fmt::format("gemma bench ended with {}", done.code);
  }
  const auto start = at + kMark.size();
  return done.error.substr(start, done.error.find('\n', start) - start);
}

Record run_row(const Row& row, const Words& command) {
  Record record{{"device", row.device}, {"mode", row.mode}, {"available", row.absent.empty()}};
  record["reason"] = row.absent.empty() ? Record() : Record(row.absent);
  if (!row.absent.empty()) {
    return record;
  }
  auto words = command;
  words.insert(words.end(), {"--device", row.device});
  words.insert(words.end(), row.flags.begin(), row.flags.end());
  const auto done = run_program(words);
  if (done.code != 0) {
    record["available"] = false;
    record["reason"] = reason_of(done);
    return record;
  }
  const auto own = Record::parse(done.out).at(0);
  for (const auto& [key, value] : own.items()) {
    if (key != "device") {
      record[key] = value;
    }
  }
  return record;
}

double rate_of(const Record& record) {
  return record["available"].get<bool>() ? record["median_ts"].get<double>() : 0;
}

std::string md_line(const Record& record) {
  const auto text = [&](const char* field) { return record[field].get<std::string>(); };
  if (!record["available"].get<bool>()) {
    return fmt::format("| {:<6} | {:<27} | {:>7} | {:<17} | {:>8} | {} |\n",
                       text("device"),
                       text("mode"),
                       "",
                       "",
                       "",
                       text("reason"));
  }
  return fmt::format(
      "| {:<6} | {:<27} | {:>7.1f} | {:<17} | {:>5.0f} MB | {} |\n",
      text("device"),
      text("mode"),
      rate_of(record),
      fmt::format("{:.1f}-{:.1f}", record["min_ts"].get<double>(), record["max_ts"].get<double>()),
      // Of the device where that has memory of its own.
      record[record["peak_device_memory_bytes"].is_null() ? "peak_memory_bytes"
                                                          : "peak_device_memory_bytes"]
              .get<double>() /
          1e6,
      fmt::format("{}, {}", text("isa"), text("weights")));
}

// Bars of the rows that ran, the longest as wide as the chart; the others say that they did not.
std::string chart(const std::vector<Record>& records, const std::string& title) {
  constexpr int kRow = 22, kLabel = 260, kWide = 420, kTop = 34;
  double most = 1;
  for (const auto& record : records) {
    most = std::max(most, rate_of(record));
  }
  const auto height = kTop + kRow * static_cast<int>(records.size()) + 8;
  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{1}\" viewBox=\"0 0 {0} "
      "{1}\" "
      "font-family=\"sans-serif\" font-size=\"12\">\n"
      "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
      "<text x=\"8\" y=\"20\" font-size=\"14\" fill=\"#202020\">{2}</text>\n",
      kLabel + kWide + 80,
      height,
      escape_html(title));
  int y = kTop;
  for (const auto& record : records) {
    const bool ran = record["available"].get<bool>();
    const auto label =
        record["device"].get<std::string>() + ": " + record["mode"].get<std::string>();
    const auto width = std::max(1.0, rate_of(record) / most * kWide);
    svg += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"{}\">{}</text>\n",
                       kLabel - 8,
                       y + 15,
                       ran ? "#202020" : "#909090",
                       escape_html(label));
    if (ran) {
      svg +=
          fmt::format("<rect x=\"{}\" y=\"{}\" width=\"{:.1f}\" height=\"16\" fill=\"#3b6ea5\"/>\n",
                      kLabel,
                      y + 3,
                      width);
    }
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{}\" fill=\"{}\">{}</text>\n",
                       ran ? kLabel + width + 6 : kLabel,
                       y + 15,
                       ran ? "#202020" : "#909090",
                       ran ? fmt::format("{:.1f}", rate_of(record)) : "not run");
    y += kRow;
  }
  return svg + "</svg>\n";
}

}  // namespace

void run_grid(const GridOptions& options) {
  check(options.format == "md" || options.format == "json",
        "[bench] --grid: expected md or json, got {}",
        options.format);
  const auto self = std::filesystem::read_symlink("/proc/self/exe").string();
  Words command{self, "bench", "-p", "0", "-d", "5", "-o", "json"};
  const auto add = [&](const char* flag, const std::string& value) {
    command.insert(command.end(), {flag, value});
  };
  add("-n", std::to_string(options.n_gen));
  add("-r", std::to_string(options.repetitions));
  add("--dtype", options.model.dtype);
  add("--kv", options.model.kv);
  if (options.model.threads > 0) {
    add("-t", std::to_string(options.model.threads));
  }
  const auto all = rows(options);
  std::vector<Record> records;
  Progress progress("row");
  if (options.format == "md") {
    print_text(
        "| device | mode                        |   tok/s | range             |     peak | how, or "
        "why not |\n"
        "|--------|-----------------------------|--------:|-------------------|---------:|---|\n");
  }
  for (const auto& row : all) {
    progress.show(static_cast<int64_t>(records.size()) + 1, static_cast<int64_t>(all.size()));
    records.push_back(run_row(row, command));
    if (options.format == "md") {
      print_text(md_line(records.back()));
    }
  }
  const auto ran = [](const Record& record) { return rate_of(record) > 0; };
  if (std::none_of(records.begin(), records.end(), ran)) {
    fail("[grid] no row ran, the first one because of {}", records[0]["reason"].get<std::string>());
  }
  if (options.format == "json") {
    print_text(Record(records).dump(2) + "\n");
  }
  if (!options.svg.empty()) {
    write_file(
        options.svg,
        chart(records,
              fmt::format(
                  "Gemma 3 270M, tokens a second, {} new tokens, {}", options.n_gen, cpu_name())));
  }
}

}  // namespace gemma_torch::apps
