#pragma once

#include <fstream>
#include <string>
#include <vector>

#include "support/scratch.h"

/// A JSONL file of one test, in a folder of its own that goes with it.
class LinesFile {
 public:
  explicit LinesFile(const std::string& text)
      : folder_("gemma_lines_" + std::to_string(count_++)), path(folder_ / "data.jsonl") {
    std::ofstream(path, std::ios::binary) << text;
  }

 private:
  static inline int count_ = 0;  // several files may live at a time
  ScratchFolder folder_;

 public:
  const std::string path;
};

/// Example i, of so many tokens, as prompt_ids and completion_ids: i + 1 at even places and i + 101
/// at odd ones; the last `targets` of them are the completion.
inline std::string id_line(int64_t i, int64_t tokens, int64_t targets = 1) {
  std::string line = "{\"prompt_ids\": [";
  for (int64_t t = 0; t < tokens; ++t) {
    line += std::to_string(i + (t % 2 == 0 ? 1 : 101));
    line += t + 1 == tokens - targets ? "], \"completion_ids\": [" : t + 1 < tokens ? ", " : "]}\n";
  }
  return line;
}

inline std::string id_lines(const std::vector<int64_t>& lengths) {
  std::string text;
  for (size_t i = 0; i < lengths.size(); ++i) {
    text += id_line(static_cast<int64_t>(i), lengths[i]);
  }
  return text;
}
