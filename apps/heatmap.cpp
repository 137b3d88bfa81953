#include "heatmap.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "page.h"

namespace gemma_torch::apps {
namespace {

constexpr size_t kNumbered = 24;  // columns whose cells have room for a number
constexpr size_t kLabel = 18;     // characters of a column's label
constexpr size_t kText = 8;       // of a text in a cell
constexpr int kLeft = 62, kTop = 8, kCellHeight = 20;

// A cell's text, in half the characters where they are of scripts that are twice as wide.
std::string cut(const std::string& text) {
  const bool wide = text.size() > 2 * characters(text);
  return shortened(text, wide ? kText / 2 : kText);
}

// Pixels that the widest text needs.
int text_width(const std::vector<std::string>& texts) {
  size_t longest = 0;
  for (const auto& text : texts) {
    const auto shown = cut(text);
    longest = std::max(longest, shown.size() > 2 * characters(shown) ? kText : characters(shown));
  }
  return 10 + 6 * static_cast<int>(longest);
}

// Where the cells of a map lie.
struct Layout {
  explicit Layout(const Heatmap& map)
      : columns(static_cast<int>(map.columns.size())), rows(static_cast<int>(map.rows.size())) {
    numbered = map.columns.size() <= kNumbered || !map.texts.empty();
    wordy = map.columns.size() <= kNumbered;
    cell = !map.texts.empty() ? text_width(map.texts) : numbered ? 44 : columns <= 64 ? 18 : 12;
    angle = cell > 12 ? -55 : -90;  // slanted, narrow columns' labels would touch
    size_t longest = 0;
    for (const auto& column : map.columns) {
      longest = std::max(longest, std::min(characters(column), kLabel));
    }
    labels = 40 + static_cast<int>(6 * longest);
  }
  int columns, rows, cell = 0, angle = 0, labels = 0;
  bool numbered = false, wordy = false;  // in the cells; under the pointer

  int y(size_t row) const { return kTop + kCellHeight * (rows - 1 - static_cast<int>(row)); }
  int bottom() const { return kTop + kCellHeight * rows; }
  int width() const { return std::max(kLeft + cell * columns + 10, 180); }
  int height() const { return bottom() + labels; }
};

// Under the pointer. Of many cells in few bytes: a page of 200 tokens has 18,000.
std::string tooltip(const Heatmap& map, size_t row, size_t column, bool wordy) {
  const auto at = row * map.columns.size() + column;
  if (!wordy) {
    return fmt::format("{}, {}: {:.3f}", escape_html(map.rows[row]), column, map.values[at]);
  }
  return escape_html(fmt::format("{} {}, {}: {:.4f}{}{}",
                                 map.row_title,
                                 map.rows[row],
                                 map.columns[column],
                                 map.values[at],
                                 map.texts.empty() ? "" : " ",
                                 map.texts.empty() ? "" : map.texts[at]));
}

std::string cell_text(const Heatmap& map, size_t at) {
  if (!map.texts.empty()) {
    return escape_html(cut(map.texts[at]));
  }
  const auto value = std::abs(map.values[at]) < 0.005 ? 0.0 : map.values[at];  // never -0.00
  return std::isfinite(value) ? fmt::format("{:.2f}", value) : "";
}

void draw_cells(const Heatmap& map, const Layout& at, const ColourScale& scale, std::string& out) {
  for (size_t row = 0; row < map.rows.size(); ++row) {
    out += fmt::format(R"s(<g transform="translate({} {})">)s", kLeft, at.y(row));
    for (size_t column = 0; column < map.columns.size(); ++column) {
      const auto value = map.values[row * map.columns.size() + column];
      const auto left = at.cell * static_cast<int>(column);
      out += fmt::format(R"(<path fill="{}" d="M{} 0h{}v{}h-{}z"><title>{}</title></path>)",
                         diverging_colour(value, scale.limit),
                         left,
                         at.cell,
                         kCellHeight,
                         at.cell,
                         tooltip(map, row, column, at.wordy));
      if (at.numbered) {
        out += fmt::format(R"(<text class="in{}" x="{}" y="14">{}</text>)",
                           needs_light_text(value, scale) ? " light" : "",
                           left + at.cell / 2,
                           cell_text(map, row * map.columns.size() + column));
      }
    }
    out += "</g>\n";
  }
}

void draw_axes(const Heatmap& map, const Layout& at, std::string& out) {
  out += fmt::format(R"(<rect class="frame" x="{}" y="{}" width="{}" height="{}"/>)",
                     kLeft,
                     kTop,
                     at.cell * at.columns,
                     kCellHeight * at.rows);
  for (size_t row = 0; row < map.rows.size(); ++row) {
    out += fmt::format(R"s(<text text-anchor="end" x="{}" y="{}">{}</text>)s",
                       kLeft - 6,
                       at.y(row) + 14,
                       escape_html(map.rows[row]));
  }
  for (size_t column = 0; column < map.columns.size(); ++column) {
    const int x = kLeft + at.cell * static_cast<int>(column) + at.cell / 2 + 4;
    const int y = at.bottom() + 12;
    out += fmt::format(R"s(<text text-anchor="end" transform="translate({} {}) )s"
                       R"s(rotate({})">{}</text>)s",
                       x,
                       y,
                       at.angle,
                       escape_html(shortened(map.columns[column], kLabel)));
  }
  out += fmt::format(R"s(<text class="axis" text-anchor="middle" transform="translate(14 {}) )s"
                     R"s(rotate(-90)">{}</text><text class="axis" x="{}" y="{}">{}</text>)s",
                     (kTop + at.bottom()) / 2,
                     escape_html(map.row_title),
                     kLeft,
                     at.height() - 4,
                     escape_html(map.column_title));
}

}  // namespace

std::string heatmap_html(const Heatmap& map) {
  const Layout at(map);
  const auto scale = scale_of(map.values);
  auto out = fmt::format(
      "<section><h2>{}</h2><p class=\"note\">{}</p>{}\n<div class=\"wide\"><svg width=\"{}\" "
      "height=\"{}\" role=\"img\" aria-label=\"{}\">\n",
      escape_html(map.title),
      escape_html(map.note),
      scale_html(scale),
      at.width(),
      at.height(),
      escape_html(map.title));
  draw_cells(map, at, scale, out);
  draw_axes(map, at, out);
  return out + "</svg></div></section>\n";
}

}  // namespace gemma_torch::apps
