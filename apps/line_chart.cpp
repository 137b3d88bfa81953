#include "line_chart.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "page.h"

namespace gemma_torch::apps {
namespace {

constexpr double kLeft = 62, kTop = 10, kWidth = 520, kHeight = 260;
constexpr int kTicks = 5;

// The numbers at both ends of an axis.
struct Range {
  double low = 0, high = 1;

  explicit Range(const std::vector<double>& values) {
    bool any = false;
    for (const auto value : values) {
      if (std::isfinite(value)) {
        low = any ? std::min(low, value) : value;
        high = any ? std::max(high, value) : value;
        any = true;
      }
    }
    if (!(high > low)) {
      low -= 0.5;
      high = low + 1;
    }
  }
  double share(double value) const { return (value - low) / (high - low); }
  double at(double share) const { return low + share * (high - low); }
};

struct Axes {
  Range x, y;
  double left(double value) const { return kLeft + kWidth * x.share(value); }
  double top(double value) const { return kTop + kHeight * (1 - y.share(value)); }
};

Axes axes_of(const LineChart& chart) {
  std::vector<double> all;
  for (const auto& line : chart.lines) {
    all.insert(all.end(), line.y.begin(), line.y.end());
  }
  return {Range(chart.x), Range(all)};
}

// Two decimals, or as many as tell one tick from the next: learning rates are small.
std::string tick_label(const Range& range, double share) {
  const auto step = (range.high - range.low) / (kTicks - 1);
  const auto decimals = std::max(2, 1 + static_cast<int>(std::ceil(-std::log10(step))));
  const auto value = range.at(share);
  return decimals <= 4 ? fmt::format("{:.{}f}", value, decimals)
                       : fmt::format("{:.{}e}", value, value == 0 ? 0 : 1);
}

// 1, 2 or 5 times a power of ten, some six of which make the range; of whole numbers at least 1.
double round_step(const Range& range, bool whole) {
  const auto wanted = (range.high - range.low) / 6;
  const auto power = std::pow(10.0, std::floor(std::log10(wanted)));
  const auto digit = wanted / power;
  const auto step = power * (digit <= 1 ? 1 : digit <= 2 ? 2 : digit <= 5 ? 5 : 10);
  return whole ? std::max(step, 1.0) : step;
}

void draw_x_ticks(const LineChart& chart, const Axes& axes, std::string& out) {
  const bool whole = std::all_of(
      chart.x.begin(), chart.x.end(), [](double x) { return std::abs(x - std::round(x)) < 1e-9; });
  const auto step = round_step(axes.x, whole);
  // Counted, not added up: 0.1 + 0.2 is no tick.
  for (auto i = std::ceil(axes.x.low / step - 1e-9); i * step <= axes.x.high + 1e-9 * step; ++i) {
    const auto left = axes.left(i * step);
    out += fmt::format(
        R"(<path stroke="#e4e8ec" d="M{0:.1f} {1}v5"/><text text-anchor="middle" x="{0:.1f}" )"
        R"(y="{2}">{3:.6g}</text>)",
        left,
        kTop + kHeight,
        kTop + kHeight + 18,
        i * step + 0.0);  // no -0
  }
}

void draw_axes(const LineChart& chart, const Axes& axes, std::string& out) {
  out += fmt::format(R"(<rect class="frame" x="{}" y="{}" width="{}" height="{}"/>)",
                     kLeft,
                     kTop,
                     kWidth,
                     kHeight);
  for (int tick = 0; tick < kTicks; ++tick) {
    const auto share = static_cast<double>(tick) / (kTicks - 1);
    const auto y = kTop + kHeight * (1 - share);
    out += fmt::format(
        R"(<path stroke="#e4e8ec" d="M{} {:.1f}h{}"/><text text-anchor="end" x="{}" y="{:.1f}">)"
        "{}</text>",
        kLeft,
        y,
        kWidth,
        kLeft - 6,
        y + 4,
        tick_label(axes.y, share));
  }
  draw_x_ticks(chart, axes, out);
  out += fmt::format(
      R"s(<text class="axis" text-anchor="middle" x="{}" y="{}">{}</text><text class="axis" )s"
      R"s(text-anchor="middle" transform="translate(14 {}) rotate(-90)">{}</text>)s",
      kLeft + kWidth / 2,
      kTop + kHeight + 36,
      escape_html(chart.x_title),
      kTop + kHeight / 2,
      escape_html(chart.y_title));
}

void draw_line(const LineChart& chart, const Axes& axes, const ChartLine& line, std::string& out) {
  std::string path, points;
  for (size_t i = 0; i < line.y.size(); ++i) {
    if (!std::isfinite(line.y[i])) {
      continue;
    }
    const auto left = axes.left(chart.x[i]), top = axes.top(line.y[i]);
    path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : "L", left, top);
    if (line.strong) {
      points += fmt::format(R"(<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="#1f4e8c"><title>)"
                            R"({:.4g}: {:.4f}</title></circle>)",
                            left,
                            top,
                            chart.x[i],
                            line.y[i]);
    }
  }
  out += fmt::format(
      R"(<path fill="none" style="shape-rendering:auto" stroke="{}" stroke-width="{}" d="{}">)"
      "<title>{}</title></path>{}\n",
      line.strong ? "#1f4e8c" : "#b9c4d0",
      line.strong ? "2.5" : "1.2",
      path,
      escape_html(line.name),
      points);
}

}  // namespace

std::string line_chart_html(const LineChart& chart) {
  const auto axes = axes_of(chart);
  auto out = fmt::format(
      "<section><h2>{}</h2><p class=\"note\">{}</p>\n<svg width=\"{}\" height=\"{}\" role=\"img\" "
      "aria-label=\"{}\">\n",
      escape_html(chart.title),
      escape_html(chart.note),
      kLeft + kWidth + 30,
      kTop + kHeight + 44,
      escape_html(chart.title));
  draw_axes(chart, axes, out);
  for (const bool strong : {false, true}) {  // the strong ones on top
    for (const auto& line : chart.lines) {
      if (line.strong == strong) {
        draw_line(chart, axes, line, out);
      }
    }
  }
  return out + "</svg></section>\n";
}

}  // namespace gemma_torch::apps
