#include "scatter.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "page.h"

namespace gemma_torch::apps {
namespace {

constexpr double kLeft = 64, kTop = 12, kWidth = 820, kHeight = 560;  // of the frame, pixels
constexpr double kInside = 28;  // least distance of a point from the frame
constexpr double kRadius = 4, kLetter = 6.3, kLine = 13;
constexpr size_t kLabel = 32;  // characters

struct Box {
  double left = 0, top = 0, right = 0, bottom = 0;
  bool meets(const Box& other) const {
    return left < other.right && other.left < right && top < other.bottom && other.top < bottom;
  }
};

// Where a point lies in the picture.
class Projection {
 public:
  explicit Projection(const std::vector<Scatter::Point>& points) {
    Box range{points[0].x, points[0].y, points[0].x, points[0].y};
    for (const auto& point : points) {
      range = {std::min(range.left, point.x),
               std::min(range.top, point.y),
               std::max(range.right, point.x),
               std::max(range.bottom, point.y)};
    }
    const auto wide = range.right - range.left, high = range.bottom - range.top;
    const auto fit = [](double pixels, double units) { return units > 0 ? pixels / units : 1e300; };
    unit_ = std::min(fit(kWidth - 2 * kInside, wide), fit(kHeight - 2 * kInside, high));
    unit_ = unit_ < 1e300 ? unit_ : 1;  // all points are one
    left_ = (range.left + range.right) / 2 - kWidth / 2 / unit_;
    bottom_ = (range.top + range.bottom) / 2 - kHeight / 2 / unit_;
  }
  double x(double value) const { return kLeft + (value - left_) * unit_; }
  double y(double value) const { return kTop + kHeight - (value - bottom_) * unit_; }
  double left() const { return left_; }
  double bottom() const { return bottom_; }
  double units(double pixels) const { return pixels / unit_; }

 private:
  double unit_ = 1;  // pixels
  double left_ = 0, bottom_ = 0;
};

// 1, 2 or 5 times a power of ten: about a sixth of the range.
double tick_step(double range) {
  const auto power = std::pow(10, std::floor(std::log10(range / 6)));
  const auto steps = range / 6 / power;
  return power * (steps <= 1 ? 1 : steps <= 2 ? 2 : steps <= 5 ? 5 : 10);
}

std::string ticks(const Projection& at) {
  const auto step = tick_step(at.units(std::max(kWidth, kHeight)));
  std::string out;
  const auto shown = [&](double value) {
    return fmt::format("{:.4g}", std::abs(value) < step / 2 ? 0.0 : value);
  };
  for (auto n = std::ceil(at.left() / step); n * step <= at.left() + at.units(kWidth); ++n) {
    const auto x = at.x(n * step);
    out += fmt::format(R"(<path stroke="#e6e9ed" d="M{:.1f} {}v{}"/>)", x, kTop, kHeight);
    out += fmt::format(R"(<text text-anchor="middle" x="{:.1f}" y="{}">{}</text>)",
                       x,
                       kTop + kHeight + 16,
                       shown(n * step));
  }
  for (auto n = std::ceil(at.bottom() / step); n * step <= at.bottom() + at.units(kHeight); ++n) {
    const auto y = at.y(n * step);
    out += fmt::format(R"(<path stroke="#e6e9ed" d="M{} {:.1f}h{}"/>)", kLeft, y, kWidth);
    out += fmt::format(R"(<text text-anchor="end" x="{}" y="{:.1f}">{}</text>)",
                       kLeft - 6,
                       y + 4,
                       shown(n * step));
  }
  return out;
}

std::string axis_titles(const Scatter& scatter) {
  return fmt::format(
      R"s(<rect class="frame" x="{0}" y="{1}" width="{2}" height="{3}"/>)s"
      R"s(<text class="axis" text-anchor="middle" x="{4}" y="{5}">{6}</text>)s"
      R"s(<text class="axis" text-anchor="middle" transform="translate(14 {7}) rotate(-90)">{8}</text>)s",
      kLeft,
      kTop,
      kWidth,
      kHeight,
      kLeft + kWidth / 2,
      kTop + kHeight + 36,
      escape_html(scatter.x_title),
      kTop + kHeight / 2,
      escape_html(scatter.y_title));
}

// Finds room for labels beside their points.
class Labels {
 public:
  void add_point(double x, double y) {
    taken_.push_back({x - kRadius, y - kRadius, x + kRadius, y + kRadius});
  }

  // The <text> of a label or the short one, "" where there is no room for either.
  std::string place(double x, double y, const Scatter::Point& point) {
    auto text = try_place(x, y, point.label);
    text = text.empty() && !point.short_label.empty() ? try_place(x, y, point.short_label) : text;
    left_out_ += text.empty() ? 1 : 0;
    return text;
  }

  int left_out() const { return left_out_; }

 private:
  std::string try_place(double x, double y, const std::string& label) {
    const auto shown = shortened(label, kLabel);
    const auto width = kLetter * static_cast<double>(characters(shown));
    constexpr double kGap = kRadius + 3;
    const Box tried[] = {{x + kGap, y - kLine / 2, x + kGap + width, y + kLine / 2},
                         {x - kGap - width, y - kLine / 2, x - kGap, y + kLine / 2},
                         {x - width / 2, y - kGap - kLine, x + width / 2, y - kGap},
                         {x - width / 2, y + kGap, x + width / 2, y + kGap + kLine}};
    for (const auto& box : tried) {
      if (is_free(box)) {
        taken_.push_back(box);
        return fmt::format(R"(<text x="{:.1f}" y="{:.1f}">{}</text>)",
                           box.left,
                           box.bottom - 3,
                           escape_html(shown));
      }
    }
    return "";
  }

  bool is_free(const Box& box) const {
    const bool inside = box.left >= kLeft && box.right <= kLeft + kWidth && box.top >= kTop &&
                        box.bottom <= kTop + kHeight;
    return inside && std::none_of(taken_.begin(), taken_.end(), [&](const Box& other) {
             return box.meets(other);
           });
  }

  std::vector<Box> taken_;
  int left_out_ = 0;
};

}  // namespace

std::string scatter_html(const Scatter& scatter) {
  std::string picture, texts;
  Labels labels;
  if (!scatter.points.empty()) {
    const Projection at(scatter.points);
    picture = ticks(at);
    for (const auto& [x, y, label, _] : scatter.points) {
      labels.add_point(at.x(x), at.y(y));
      picture += fmt::format(
          R"(<circle fill="#2166ac" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}: {:.4f}, {:.4f}</title></circle>)",
          at.x(x),
          at.y(y),
          kRadius,
          escape_html(label),
          x,
          y);
    }
    for (const auto& point : scatter.points) {
      texts += labels.place(at.x(point.x), at.y(point.y), point);
    }
  }
  auto note = scatter.note;
  if (labels.left_out() > 0) {
    note += fmt::format(" {} labels that would cover others are under the pointer only.",
                        labels.left_out());
  }
  return fmt::format(
      "<section><h2>{}</h2><p class=\"note\">{}</p>\n<div class=\"wide\"><svg class=\"scatter\" "
      "width=\"{}\" height=\"{}\" role=\"img\" aria-label=\"{}\">\n{}{}{}</svg></div></section>\n",
      escape_html(scatter.title),
      escape_html(note),
      kLeft + kWidth + 10,
      kTop + kHeight + 44,
      escape_html(scatter.title),
      axis_titles(scatter),
      picture,
      texts);
}

}  // namespace gemma_torch::apps
