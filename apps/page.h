#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace gemma_torch::apps {

/// Text for an HTML page: what HTML reads as markup is escaped, and what cannot be seen is shown
/// (a line's end as U+21B5, other control characters as U+FFFD).
std::string escape_html(std::string_view text);

/// Characters of UTF-8 text.
size_t characters(std::string_view text);

/// The first `length` characters, with U+2026 where more follow.
std::string shortened(std::string_view text, size_t length);

/// "#rrggbb": blue at -limit, white at 0, red at limit and beyond; grey for what is no number.
std::string diverging_colour(double value, double limit);

/// How numbers become colours: white at 0, red at `limit`, and blue at -limit where some are below 0.
struct ColourScale {
  double limit = 1;
  bool diverging = true;
};

/// A scale that ends at the largest of the finite numbers.
ColourScale scale_of(const std::vector<double>& values);

/// Whether white letters stand out better on a number's colour than black ones.
bool needs_light_text(double value, const ColourScale& scale);

/// A bar of the colours with numbers under it.
std::string scale_html(const ColourScale& scale);

/// A text whose tokens have a number each.
struct ColouredText {
  std::string title = {};
  std::string note = {};                   // below the title
  std::vector<std::string> tokens = {};    // as they read, spaces and line ends among them
  std::vector<double> values = {};         // one for each
  std::vector<std::string> captions = {};  // under the pointer; empty: the numbers
};

/// A <section> with the text, its tokens on the colours of their numbers, and the scale.
std::string coloured_text_html(const ColouredText& text);

/// A whole page that needs nothing but itself: no script, no link. `body` is HTML.
std::string html_page(std::string_view title, std::string_view body);

}  // namespace gemma_torch::apps
