#pragma once

#include <string>
#include <vector>

namespace gemma_torch::apps {

/// Points in the plane, one unit of either axis being as long as one of the other.
struct Scatter {
  struct Point {
    double x = 0, y = 0;
    std::string label = {};
    std::string short_label = {};  // where there is no room for the label
  };
  std::string title = {};
  std::string note = {};  // below the title
  std::string x_title = {}, y_title = {};
  std::vector<Point> points = {};
};

/// A <section> with one SVG, no script. Labels stand where they cover no point and no other label;
/// where there is no such place the short label is tried. All are shown under the pointer; the note
/// says how many are nowhere else. Style: what `html_page` holds.
std::string scatter_html(const Scatter& scatter);

}  // namespace gemma_torch::apps
