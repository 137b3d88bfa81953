#include "page.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace gemma_torch::apps {
namespace {

constexpr std::string_view kStyle = R"(
body{font:15px/1.45 system-ui,"Segoe UI","DejaVu Sans",sans-serif;color:#1b1f24;background:#fff;
margin:24px auto;max-width:1160px;padding:0 20px}
main{display:flex;flex-wrap:wrap;gap:0 44px}section{max-width:100%}
h1{font-size:22px;margin:0 0 8px}h2{font-size:17px;margin:26px 0 2px}
p{margin:4px 0}.note{color:#57606a}.wide{overflow-x:auto}
code{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:13px;background:#f3f4f6;
border-radius:3px;padding:1px 4px;white-space:pre-wrap;overflow-wrap:anywhere}
svg text{font:11px system-ui,"Segoe UI","DejaVu Sans",sans-serif;fill:#1b1f24}
svg .axis{font-size:12px;fill:#57606a}svg .in{text-anchor:middle;font-size:10px;pointer-events:none}
svg .light{fill:#fff}svg .frame{fill:none;stroke:#c4ccd4}
svg path,svg rect{shape-rendering:crispEdges}
)";

constexpr size_t kNumbered = 24;  // columns whose cells have room for a number
constexpr size_t kLabel = 18;     // characters of a column's label
constexpr int kLeft = 62, kTop = 8, kCellHeight = 20;

// What a byte of text is on a page; empty: itself.
std::string_view escape(char c) {
  switch (c) {
    case '&':
      return "&amp;";
    case '<':
      return "&lt;";
    case '>':
      return "&gt;";
    case '"':
      return "&quot;";
    case '\'':
      return "&#39;";
    case '\n':
      return "\u21b5";
    default:
      return (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) ? "\ufffd" : "";
  }
}

bool starts_character(char byte) {
  return (static_cast<unsigned char>(byte) & 0xc0) != 0x80;  // not the tail of a UTF-8 character
}

double largest(const std::vector<double>& values) {
  double most = 0;
  for (const auto value : values) {
    most = std::isfinite(value) ? std::max(most, std::abs(value)) : most;
  }
  return most > 0 ? most : 1;
}

// Where the cells of a map lie.
struct Layout {
  explicit Layout(const Heatmap& map)
      : columns(static_cast<int>(map.columns.size())), rows(static_cast<int>(map.rows.size())) {
    numbered = map.columns.size() <= kNumbered;
    cell = numbered ? 44 : columns <= 64 ? 18 : 12;
    angle = cell > 12 ? -55 : -90;  // slanted, narrow columns' labels would touch
    size_t longest = 0;
    for (const auto& column : map.columns) {
      const auto length = std::count_if(column.begin(), column.end(), starts_character);
      longest = std::max(longest, std::min(static_cast<size_t>(length), kLabel));
    }
    labels = 40 + static_cast<int>(6 * longest);
  }
  int columns, rows, cell = 0, angle = 0, labels = 0;
  bool numbered = false;

  int y(size_t row) const { return kTop + kCellHeight * (rows - 1 - static_cast<int>(row)); }
  int bottom() const { return kTop + kCellHeight * rows; }
  int width() const { return std::max(kLeft + cell * columns + 10, 180); }
  int height() const { return bottom() + labels; }
};

// Under the pointer. Of many cells in few bytes: a page of 200 tokens has 18,000.
std::string tooltip(const Heatmap& map, size_t row, size_t column, bool wordy) {
  const auto value = map.values[row * map.columns.size() + column];
  if (!wordy) {
    return fmt::format("{}, {}: {:.3f}", row, column, value);
  }
  return escape_html(
      fmt::format("{} {}, {}: {:.4f}", map.row_title, map.rows[row], map.columns[column], value));
}

void draw_cells(const Heatmap& map, const Layout& at, double limit, std::string& out) {
  for (size_t row = 0; row < map.rows.size(); ++row) {
    out += fmt::format(R"s(<g transform="translate({} {})">)s", kLeft, at.y(row));
    for (size_t column = 0; column < map.columns.size(); ++column) {
      const auto value = map.values[row * map.columns.size() + column];
      const auto left = at.cell * static_cast<int>(column);
      out += fmt::format(R"(<path fill="{}" d="M{} 0h{}v{}h-{}z"><title>{}</title></path>)",
                         diverging_colour(value, limit),
                         left,
                         at.cell,
                         kCellHeight,
                         at.cell,
                         tooltip(map, row, column, at.numbered));
      if (at.numbered) {
        out += fmt::format(R"(<text class="in{}" x="{}" y="14">{:.2f}</text>)",
                           std::abs(value) > 0.6 * limit ? " light" : "",
                           left + at.cell / 2,
                           std::abs(value) < 0.005 ? 0.0 : value);  // never -0.00
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

// The scale: a bar of colours with numbers under it.
std::string legend(double limit) {
  constexpr int kSteps = 41, kStep = 8, kIndent = 24;
  std::string out = fmt::format(R"(<svg width="{}" height="36" role="img">)", kSteps * kStep + 60);
  for (int i = 0; i < kSteps; ++i) {
    const auto value = limit * (2.0 * i / (kSteps - 1) - 1);
    out += fmt::format(R"(<rect x="{}" y="2" width="{}" height="14" fill="{}"/>)",
                       kIndent + i * kStep,
                       kStep,
                       diverging_colour(value, limit));
  }
  for (int tick = 0; tick <= 4; ++tick) {
    out += fmt::format(R"(<text text-anchor="middle" x="{}" y="30">{:.2f}</text>)",
                       kIndent + kStep / 2 + tick * (kSteps - 1) * kStep / 4,
                       limit * (tick / 2.0 - 1));
  }
  return out + "</svg>";
}

}  // namespace

std::string escape_html(std::string_view text) {
  std::string out;
  for (const char c : text) {
    const auto instead = escape(c);
    instead.empty() ? out.push_back(c) : void(out += instead);
  }
  return out;
}

std::string shortened(std::string_view text, size_t length) {
  size_t characters = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    if (starts_character(text[i]) && ++characters > length) {
      return std::string(text.substr(0, i)) + "\u2026";
    }
  }
  return std::string(text);
}

std::string diverging_colour(double value, double limit) {
  using Rgb = std::array<double, 3>;
  constexpr Rgb kWhite = {255, 255, 255}, kRed = {178, 24, 43}, kBlue = {33, 102, 172};
  if (!std::isfinite(value)) {
    return "#b0b0b0";
  }
  const auto share = std::min(std::abs(value) / limit, 1.0);
  const auto& end = value < 0 ? kBlue : kRed;
  std::string out = "#";
  for (size_t i = 0; i < 3; ++i) {
    out += fmt::format("{:02x}", std::lround(kWhite[i] + share * (end[i] - kWhite[i])));
  }
  return out;
}

std::string heatmap_html(const Heatmap& map) {
  const Layout at(map);
  const auto limit = largest(map.values);
  auto out = fmt::format(
      "<section><h2>{}</h2><p class=\"note\">{}</p>{}\n<div class=\"wide\"><svg width=\"{}\" "
      "height=\"{}\" role=\"img\" aria-label=\"{}\">\n",
      escape_html(map.title),
      escape_html(map.note),
      legend(limit),
      at.width(),
      at.height(),
      escape_html(map.title));
  draw_cells(map, at, limit, out);
  draw_axes(map, at, out);
  return out + "</svg></div></section>\n";
}

std::string html_page(std::string_view title, std::string_view body) {
  return fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{}</title>\n"
      "<style>{}</style></head><body>\n{}</body></html>\n",
      escape_html(title),
      kStyle,
      body);
}

}  // namespace gemma_torch::apps
