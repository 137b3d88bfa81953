#include "attention_page.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "page.h"
#include "token_labels.h"

namespace gemma_torch::apps {
namespace {

constexpr int kLevels = 10;       // step n begins at a weight of (n / 10)^2: 1 %, 4 %, .. 100 %
constexpr double kLabelled = 11;  // pixels of a cell beside which a label has room
constexpr size_t kLabel = 10;     // characters of it
constexpr size_t kPointedRows = 3000;  // rows of a page that answer to the pointer

std::string level_colour(int level) {
  return diverging_colour(level, kLevels);
}

int level_of(float weight) {
  // Weights are sums of rounded exponentials: 1 may be a bit less.
  return static_cast<int>(std::sqrt(static_cast<double>(weight)) * kLevels + 1e-6);
}

// One path for each step: horizontal runs of cells, each placed from where the last one ended.
std::string cells(const at::Tensor& pixels) {
  const auto side = pixels.size(0);
  const auto* weight = pixels.const_data_ptr<float>();
  std::vector<std::string> paths(kLevels + 1);
  std::vector<std::pair<int64_t, int64_t>> pens(kLevels + 1);  // x and y
  for (int64_t y = 0; y < side; ++y) {
    for (int64_t x = 0; x < side;) {
      const auto level = level_of(weight[y * side + x]);
      auto end = x + 1;
      while (end < side && level_of(weight[y * side + end]) == level) {
        ++end;
      }
      auto& pen = pens[static_cast<size_t>(level)];
      if (level > 0) {
        paths[static_cast<size_t>(level)] +=
            fmt::format("m{} {}h{}", x - pen.first, y - pen.second, end - x);
        pen = {end, y};
      }
      x = end;
    }
  }
  std::string out;
  for (int level = 1; level <= kLevels; ++level) {
    const auto& path = paths[static_cast<size_t>(level)];
    if (!path.empty()) {
      out += fmt::format(R"(<path stroke="{}" d="M0 .5{}"/>)", level_colour(level), path);
    }
  }
  return out;
}

// "·is: ·France 0.61, <bos> 0.30, ·of 0.05"
std::string row_title(const at::Tensor& weights,
                      const std::vector<std::string>& labels,
                      size_t row) {
  constexpr size_t kShown = 3;
  const auto* weight = weights.const_data_ptr<float>();
  std::vector<size_t> order(row + 1);
  std::iota(order.begin(), order.end(), size_t{0});
  const auto shown = std::min(kShown, order.size());
  std::partial_sort(order.begin(),
                    order.begin() + static_cast<int64_t>(shown),
                    order.end(),
                    [&](size_t a, size_t b) { return weight[a] > weight[b]; });
  auto text = labels[row] + ":";
  for (size_t i = 0; i < shown; ++i) {
    text += fmt::format(
        "{} {} {:.2f}", i > 0 ? "," : "", labels[order[i]], static_cast<double>(weight[order[i]]));
  }
  return text;
}

// How the pictures of a page are drawn.
struct Style {
  int side = 0;     // pixels of a picture
  double cell = 0;  // of one of its cells
  bool labelled = false, pointed = false;
  int left = 0, below = 0;  // pixels for labels
};

Style style_of(const AttentionCase& of, const std::vector<std::string>& labels) {
  constexpr int kOne = 720, kFew = 460, kMany = 256, kLabelledMany = 190;  // four beside each other
  const auto maps = of.maps.size();
  const auto pixels = static_cast<double>(of.maps[0].pixels.size(0));
  const bool whole = of.maps[0].pixels.size(0) == static_cast<int64_t>(of.ids.size());
  Style style{.side = maps == 1 ? kOne : maps <= 2 ? kFew : kLabelledMany};
  style.labelled = whole && style.side / pixels >= kLabelled;
  style.side = maps > 2 && !style.labelled ? kMany : style.side;
  style.cell = style.side / pixels;
  style.pointed = whole && maps * of.ids.size() <= kPointedRows;
  size_t longest = 0;
  for (const auto& label : labels) {
    longest = std::max(longest, std::min(characters(label), kLabel) + 1);
  }
  style.left = style.labelled ? 8 + static_cast<int>(7 * longest) : 1;
  style.below = style.left;
  return style;
}

std::string axis_labels(const std::vector<std::string>& labels, const Style& style) {
  std::string out;
  for (size_t i = 0; i < labels.size(); ++i) {
    const auto middle = (static_cast<double>(i) + 0.5) * style.cell + 4;
    const auto label = escape_html(shortened(labels[i], kLabel));
    out += fmt::format(
        R"(<text text-anchor="end" x="{}" y="{:.0f}">{}</text>)", style.left - 5, middle, label);
    out += fmt::format(
        R"s(<text text-anchor="end" transform="translate({:.0f} {}) rotate(-90)">{}</text>)s",
        style.left + middle,
        style.side + 6,
        label);
  }
  return out;
}

std::string map_html(const AttentionMap& map,
                     const std::vector<std::string>& labels,
                     const Style& style) {
  const auto side = map.pixels.size(0);
  auto out = fmt::format(
      "<figure style=\"width:{}px\"><figcaption>head {}: first {:.2f}, previous {:.2f}, self "
      "{:.2f}, entropy "
      "{:.2f}</figcaption><svg width=\"{}\" height=\"{}\" role=\"img\" aria-label=\"layer {} head "
      "{}\">",
      style.left + style.side + 1,
      map.head,
      map.to_first,
      map.to_previous,
      map.to_self,
      map.entropy,
      style.left + style.side + 1,
      style.side + style.below,
      map.layer,
      map.head);
  out += fmt::format(R"s(<g transform="translate({} 0) scale({:.4f})">)s", style.left, style.cell);
  out += cells(map.pixels);
  for (int64_t row = 0; style.pointed && row < side; ++row) {
    out += fmt::format(
        R"(<rect fill-opacity="0" y="{}" width="{}" height="1"><title>{}</title></rect>)",
        row,
        side,
        escape_html(row_title(map.pixels[row], labels, static_cast<size_t>(row))));
  }
  out += fmt::format(R"(</g><rect class="frame" x="{}" y="0.5" width="{}" height="{}"/>)",
                     style.left,
                     style.side,
                     style.side - 1);
  return out + (style.labelled ? axis_labels(labels, style) : "") + "</svg></figure>\n";
}

std::string steps_html() {
  constexpr int kWidth = 34;
  auto out = fmt::format(R"(<svg width="{}" height="36" role="img">)", (kLevels + 1) * kWidth + 20);
  for (int level = 0; level <= kLevels; ++level) {
    out += fmt::format(R"(<rect x="{}" y="2" width="{}" height="14" fill="{}" stroke="#c4ccd4"/>)"
                       R"(<text text-anchor="middle" x="{}" y="30">{}%</text>)",
                       8 + level * kWidth,
                       kWidth,
                       level_colour(level),
                       12 + level * kWidth,
                       level * level);
  }
  return out + "</svg>";
}

constexpr std::string_view kStyle =
    "<style>figure{margin:6px 0}figcaption{font-size:12px;color:#57606a}.layer{display:flex;"
    "flex-wrap:wrap;gap:2px 12px}figure path{fill:none;stroke-width:1.02}</style>\n";

}  // namespace

std::string attention_page(const AttentionCase& of, const std::optional<Tokenizer>& tokenizer) {
  const auto labels = token_labels(of.ids, tokenizer);
  const auto style = style_of(of, labels);
  const auto pooled = (of.ids.size() - 1) / static_cast<size_t>(of.maps[0].pixels.size(0)) + 1;
  auto body = fmt::format(
      "{}<h1>Attention</h1>\n<p>Prompt, {} tokens: <code>{}</code></p>\n<p class=\"note\">Each row "
      "of a picture is a token, from the top; along it, from the left, how much it attends to each "
      "of those before it and to itself.{} Above each: the mean weight on the first token, on the "
      "one before and on itself, and the entropy in nats, of the tokens after the first.</p>{}\n",
      kStyle,
      of.ids.size(),
      escape_html(prompt_text(of.ids, tokenizer)),
      pooled > 1 ? fmt::format(" A cell is the largest of {0} x {0} weights.", pooled) : "",
      steps_html());
  int64_t layer = -1;
  for (const auto& map : of.maps) {
    if (map.layer != layer) {
      const bool sliding =
          of.config.layer_types[static_cast<size_t>(map.layer)] == LayerType::kSlidingAttention;
      body += fmt::format(
          "{}<h2>Layer {}{}</h2>\n<div class=\"layer\">\n",
          layer < 0 ? "" : "</div>\n",
          map.layer,
          sliding ? fmt::format(", sliding window of {} tokens", of.config.sliding_window)
                  : ", full attention");
      layer = map.layer;
    }
    body += map_html(map, labels, style);
  }
  return html_page("Attention", body + "</div>\n");
}

}  // namespace gemma_torch::apps
