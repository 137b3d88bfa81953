#include "csv.h"

namespace gemma_torch::apps {

std::string csv_cell(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) {
    return text;
  }
  std::string cell = "\"";
  for (const char c : text) {
    cell += c == '"' ? "\"\"" : std::string(1, c);
  }
  return cell + "\"";
}

std::string csv_line(const std::vector<std::string>& cells) {
  std::string line;
  for (const auto& cell : cells) {
    line += (line.empty() ? "" : ",") + csv_cell(cell);
  }
  return line + "\r\n";
}

}  // namespace gemma_torch::apps
