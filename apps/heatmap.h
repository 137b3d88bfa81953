#pragma once

#include <string>
#include <vector>

namespace gemma_torch::apps {

/// Numbers in rows and columns, drawn as coloured cells.
struct Heatmap {
  std::string title = {};
  std::string note = {};       // below the title
  std::string row_title = {};  // of the axes
  std::string column_title = {};
  std::vector<std::string> rows = {};     // labels, the first at the bottom
  std::vector<std::string> columns = {};  // labels, from the left
  std::vector<double> values = {};        // row by row
  std::vector<std::string> texts = {};    // in the cells instead of the numbers; empty: none
};

/// A <section> with one SVG and the scale of its colours. Up to 24 columns have their numbers in
/// the cells, texts stand there always, cut to 8 characters; all show their numbers under the
/// pointer. Style: what `html_page` holds.
std::string heatmap_html(const Heatmap& map);

}  // namespace gemma_torch::apps
