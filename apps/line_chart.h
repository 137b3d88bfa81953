#pragma once

#include <string>
#include <vector>

namespace gemma_torch::apps {

/// One line of a chart: y over the chart's x.
struct ChartLine {
  std::string name = {};  // under the pointer
  std::vector<double> y = {};
  bool strong = false;  // drawn dark and thick, with its points; else thin and pale
};

struct LineChart {
  std::string title = {};
  std::string note = {};  // below the title
  std::string x_title = {};
  std::string y_title = {};
  std::vector<double> x = {};  // ascending, at least two
  std::vector<ChartLine> lines = {};
};

/// A <section> with one SVG. Numbers that are not finite are left out.
std::string line_chart_html(const LineChart& chart);

}  // namespace gemma_torch::apps
