#pragma once

#include <string>
#include <vector>

namespace gemma_torch::apps {

/// A cell of a CSV file: in quotes, quotes doubled, where it holds a comma, a quote or a line's end
/// (RFC 4180); else as it is.
std::string csv_cell(const std::string& text);

/// Cells with commas between them, and a line's end.
std::string csv_line(const std::vector<std::string>& cells);

}  // namespace gemma_torch::apps
