#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace gemma_torch::apps {

/// Text for an HTML page: what HTML reads as markup is escaped, and what cannot be seen is shown
/// (a line's end as U+21B5, other control characters as U+FFFD).
std::string escape_html(std::string_view text);

/// The first `length` characters, with U+2026 where more follow.
std::string shortened(std::string_view text, size_t length);

/// "#rrggbb": blue at -limit, white at 0, red at limit and beyond; grey for what is no number.
std::string diverging_colour(double value, double limit);

/// Numbers in rows and columns, drawn as coloured cells.
struct Heatmap {
  std::string title = {};
  std::string note = {};       // below the title
  std::string row_title = {};  // of the axes
  std::string column_title = {};
  std::vector<std::string> rows = {};     // labels, the first at the bottom
  std::vector<std::string> columns = {};  // labels, from the left
  std::vector<double> values = {};        // row by row
};

/// A <section> with one SVG and the scale of its colours. Up to 24 columns have their numbers in
/// the cells; all show them under the pointer. Style: what `html_page` holds.
std::string heatmap_html(const Heatmap& map);

/// A whole page that needs nothing but itself: no script, no link. `body` is HTML.
std::string html_page(std::string_view title, std::string_view body);

}  // namespace gemma_torch::apps
