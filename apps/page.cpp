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
.tokens{font-size:16px;line-height:1.9;white-space:pre-wrap;overflow-wrap:anywhere}
.tokens span{padding:2px 0;border-radius:2px;box-shadow:inset -1px 0 #fff}.tokens .light{color:#fff}
)";

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

// White text is read better on colours beyond this share of the limit.
constexpr double kDark = 0.6;

}  // namespace

bool needs_light_text(double value, const ColourScale& scale) {
  return std::abs(value) > kDark * scale.limit;
}

std::string escape_html(std::string_view text) {
  std::string out;
  for (const char c : text) {
    const auto instead = escape(c);
    instead.empty() ? out.push_back(c) : void(out += instead);
  }
  return out;
}

size_t characters(std::string_view text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), starts_character));
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

ColourScale scale_of(const std::vector<double>& values) {
  ColourScale scale{.limit = 0, .diverging = false};
  for (const auto value : values) {
    scale.limit = std::isfinite(value) ? std::max(scale.limit, std::abs(value)) : scale.limit;
    scale.diverging = scale.diverging || value < 0;
  }
  scale.limit = scale.limit > 0 ? scale.limit : 1;
  return scale;
}

std::string scale_html(const ColourScale& scale) {
  constexpr int kSteps = 41, kStep = 8, kIndent = 24;
  const double low = scale.diverging ? -scale.limit : 0.0;
  std::string out = fmt::format(R"(<svg width="{}" height="36" role="img">)", kSteps * kStep + 60);
  for (int i = 0; i < kSteps; ++i) {
    out += fmt::format(R"(<rect x="{}" y="2" width="{}" height="14" fill="{}"/>)",
                       kIndent + i * kStep,
                       kStep,
                       diverging_colour(low + (scale.limit - low) * i / (kSteps - 1), scale.limit));
  }
  for (int tick = 0; tick <= 4; ++tick) {
    out += fmt::format(R"(<text text-anchor="middle" x="{}" y="30">{:.2f}</text>)",
                       kIndent + kStep / 2 + tick * (kSteps - 1) * kStep / 4,
                       low + (scale.limit - low) * tick / 4);
  }
  return out + "</svg>";
}

std::string coloured_text_html(const ColouredText& text) {
  const auto scale = scale_of(text.values);
  auto out = fmt::format("<section><h2>{}</h2><p class=\"note\">{}</p>{}\n<p class=\"tokens\">",
                         escape_html(text.title),
                         escape_html(text.note),
                         scale_html(scale));
  for (size_t i = 0; i < text.tokens.size(); ++i) {
    const auto value = text.values[i];
    out += fmt::format(
        R"(<span{} style="background:{}" title="{}">{}</span>{})",
        needs_light_text(value, scale) ? R"( class="light")" : "",
        diverging_colour(value, scale.limit),
        escape_html(text.captions.empty() ? fmt::format("{:.4f}", value) : text.captions[i]),
        escape_html(text.tokens[i]),
        text.tokens[i].find('\n') == std::string::npos ? "" : "<br>");
  }
  return out + "</p></section>\n";
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
