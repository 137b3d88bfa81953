#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace gemma_torch::apps {

/// A JSONL file that long work writes line by line, so that it can be stopped and go on later. The
/// first line, the header, says what made it; what is left of a line whose writing was cut is
/// dropped. A file without a row is removed. One process at a time.
class ResultsFile {
 public:
  /// Opens or makes the file. Throws: Error, leaving it as it is, if it is no such file, has another
  /// header (naming the first field that differs), or another process has it open.
  ResultsFile(std::string path, const nlohmann::json& header);
  ~ResultsFile();

  /// The rows that were there when it was opened.
  const std::vector<nlohmann::json>& found() const { return found_; }

  /// Throws: Error if it cannot be written whole.
  void append(const nlohmann::json& row);

 private:
  void check_header(const std::string& line, const nlohmann::json& header) const;

  // Closed, and so unlocked, on every way out.
  class Descriptor {
   public:
    explicit Descriptor(int value) : value_(value) {}
    ~Descriptor();
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    int get() const { return value_; }

   private:
    int value_;
  };

  std::string path_;
  Descriptor file_;
  std::string header_;  // its line, until that is written with the first row
  std::vector<nlohmann::json> found_;
};

}  // namespace gemma_torch::apps
