#pragma once

#include <functional>
#include <string>
#include <vector>

#include "gemma_torch/adapt/training_example.h"
#include "gemma_torch/base/fingerprint.h"

namespace gemma_torch {

/// Called while a file is read for the first time, in bytes; may throw to stop.
using ReadProgress = std::function<void(int64_t done, int64_t total)>;

/// The examples of a JSONL file, one a line as parse_example() reads them. The file may be larger
/// than memory: 24 bytes a line are kept, and an example is read and encoded when it is asked for.
/// Lines end with \n or \r\n; the last may be blank. const calls are thread-safe.
class TrainingData {
 public:
  /// Reads the whole file once, so that no fault is left for the middle of a training run.
  /// Lines without a target among their first max_tokens are left out and counted. `tokenizer` is
  /// shared and must live as long; null: only lines of ids are served.
  /// Throws: Error, `[training_data] path:line: ..`, for the first line that parse_example()
  /// refuses, a blank one before the end, one of more than 64 MiB, a byte order mark;
  /// `[training_data] path: ..` for a file that is missing, no regular file, empty, changes
  /// meanwhile, or of which every line was left out; for max_tokens below 2.
  TrainingData(std::string path,
               const Tokenizer* tokenizer,
               const ExampleOptions& options = {},
               const ReadProgress& on_progress = {});
  TrainingData(const TrainingData&) = delete;
  TrainingData& operator=(const TrainingData&) = delete;

  /// Throws: Error if there is no such example, or if the file was written to since it was opened.
  /// (One that was replaced under its name is still the file that was opened.)
  Example example(int64_t index) const;

  int64_t size() const { return static_cast<int64_t>(lines_.size()); }
  int64_t length(int64_t index) const { return at(index).tokens; }  // tokens of an example
  int64_t line(int64_t index) const { return at(index).number; }    // where it stands, from 1

  // Of the examples served, each once.
  int64_t tokens() const { return tokens_; }
  int64_t targets() const { return targets_; }
  int64_t longest() const { return longest_; }      // tokens of the longest
  int64_t truncated() const { return truncated_; }  // examples that lost their end
  int64_t left_out() const { return left_out_; }    // lines that lost all their targets, not served

  /// Of all lines that are served.
  std::string fingerprint() const { return fingerprint_.hex(); }

  const std::string& path() const { return path_; }
  const ExampleOptions& options() const { return options_; }

 private:
  struct Line {
    int64_t offset = 0;  // bytes from the start of the file
    int64_t number = 0;
    int32_t bytes = 0;
    int32_t tokens = 0;
  };

  struct Descriptor {
    int number = -1;
    ~Descriptor();
  };
  struct FileState {
    int64_t bytes = 0, seconds = 0, nanoseconds = 0;  // size and time of the last write
    bool operator==(const FileState&) const = default;
  };

  const Line& at(int64_t index) const;
  FileState state() const;
  size_t read_at(int64_t offset, char* into, size_t bytes) const;
  void scan(const ReadProgress& on_progress);
  void add(std::string_view line, int64_t offset, int64_t number);
  std::string place(int64_t number) const;
  void check_unchanged() const;

  std::string path_;
  const Tokenizer* tokenizer_;
  ExampleOptions options_;
  Descriptor file_;
  FileState opened_;
  std::vector<Line> lines_;
  int64_t tokens_ = 0, targets_ = 0, longest_ = 0, truncated_ = 0, left_out_ = 0;
  Fingerprint fingerprint_;
};

}  // namespace gemma_torch
