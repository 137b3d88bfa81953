#pragma once

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>

#include "results_file.h"

namespace gemma_torch::apps {

/// --resume, of a command that makes a large file.
void add_resume_flag(CLI::App& command, bool& resume);

/// How far a file is that grows as part_path(FILE): rows in FILE.part.jsonl, of which the last one
/// counts. A process that is killed leaves both files; one that fails before its first row neither.
class PartJournal {
 public:
  /// Throws: as ResultsFile.
  PartJournal(const std::string& file, const nlohmann::json& header);
  ~PartJournal();

  /// The last row, of this run or an earlier one; null where there is none, or no part of the file.
  const nlohmann::json& last() const { return last_; }

  void append(const nlohmann::json& row);
  void remove();  // once the file is whole

 private:
  std::string part_;
  ResultsFile rows_;
  nlohmann::json last_;
};

}  // namespace gemma_torch::apps
