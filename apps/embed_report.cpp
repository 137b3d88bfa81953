#include "embed_report.h"

#include <fmt/format.h>

#include <algorithm>

#include "common.h"
#include "heatmap.h"
#include "page.h"
#include "scatter.h"
#include "tensor_json.h"
#include "token_labels.h"

namespace gemma_torch::apps {
namespace {

constexpr size_t kLabel = 48;    // characters of a text in a list
constexpr size_t kMapped = 100;  // vectors whose similarities make a map: 10,000 cells

struct Neighbour {
  int64_t id = 0;
  double similarity = 0;
};

std::vector<Neighbour> neighbours_of(const Neighbours& nearest, int64_t row) {
  std::vector<Neighbour> found;
  for (int64_t i = 0; i < nearest.ids.size(1); ++i) {
    found.push_back(
        {nearest.ids[row][i].item<int64_t>(), nearest.similarity[row][i].item<double>()});
  }
  return found;
}

nlohmann::json nearest_json(const Embedded& found, const std::optional<Tokenizer>& tokenizer) {
  auto lists = nlohmann::json::array();
  for (int64_t row = 0; row < found.vectors.size(0); ++row) {
    auto list = nlohmann::json::array();
    for (const auto& [id, similarity] : neighbours_of(*found.nearest, row)) {
      list.push_back(
          {{"id", id}, {"piece", piece_json(id, tokenizer)}, {"similarity", similarity}});
    }
    lists.push_back(std::move(list));
  }
  return lists;
}

std::string numbered(const Embedded& found, size_t n, size_t length) {
  return fmt::format("{} {}", n, shortened(found.labels[n], length));
}

// A matrix reads from the top, a heatmap's first row is at the bottom.
std::string similarity_html(const Embedded& found) {
  const auto count = found.labels.size();
  Heatmap map{.title = "Cosine similarity",
              .note = "The number of a row is that of the text in the column of the same number.",
              .row_title = "text",
              .column_title = "text",
              .rows = {},
              .columns = {},
              .values = {}};
  const auto values = numbers(found.similarity);
  for (size_t row = count; row-- > 0;) {
    map.rows.push_back(std::to_string(row));
    const auto begin = values.begin() + static_cast<std::ptrdiff_t>(row * count);
    map.values.insert(map.values.end(), begin, begin + static_cast<std::ptrdiff_t>(count));
  }
  for (size_t n = 0; n < count; ++n) {
    map.columns.push_back(numbered(found, n, kLabel));
  }
  return heatmap_html(map);
}

std::string axes_html(const Embedded& found) {
  const auto axes = principal_axes(found.vectors, /*k=*/2);
  const auto shares = numbers(axes.shares), places = numbers(axes.coordinates);
  Scatter scatter{.title = "Principal axes",
                  .note = "Texts that lie together have like vectors, as far as two axes show it.",
                  .x_title = fmt::format("axis 1: {:.1f} % of the variance", 100 * shares[0]),
                  .y_title = fmt::format("axis 2: {:.1f} %", 100 * shares[1]),
                  .points = {}};
  for (size_t n = 0; n < found.labels.size(); ++n) {
    scatter.points.push_back(
        {places[2 * n], places[2 * n + 1], numbered(found, n, kLabel), std::to_string(n)});
  }
  return scatter_html(scatter);
}

std::string nearest_html(const Embedded& found, const std::optional<Tokenizer>& tokenizer) {
  std::string out =
      "<section><h2>Nearest rows of the embedding table</h2>"
      "<p class=\"note\">Tokens and the cosine of their rows with each vector.</p>";
  for (size_t n = 0; n < found.labels.size(); ++n) {
    out += fmt::format("<p>{}", escape_html(numbered(found, n, kLabel)));
    for (const auto& [id, similarity] : neighbours_of(*found.nearest, static_cast<int64_t>(n))) {
      out += fmt::format(
          " <code>{}</code> {:.3f}", escape_html(token_label(id, tokenizer)), similarity);
    }
    out += "</p>\n";
  }
  return out + "</section>\n";
}

}  // namespace

nlohmann::json embedded_json(const Embedded& found, const std::optional<Tokenizer>& tokenizer) {
  return {
      {"vectors", tensor_json(found.vectors)},
      {"similarity", found.similarity.defined() ? tensor_json(found.similarity) : nlohmann::json()},
      {"nearest", found.nearest ? nearest_json(found, tokenizer) : nlohmann::json()}};
}

std::string embedded_text(const Embedded& found, const std::optional<Tokenizer>& tokenizer) {
  const auto count = found.vectors.size(0);
  std::string text;
  for (int64_t row = 0; found.similarity.defined() && row < count; ++row) {
    for (const auto value : numbers(found.similarity[row])) {
      text += fmt::format("{:>7.3f}", value);
    }
    text += fmt::format("  {}\n", numbered(found, static_cast<size_t>(row), kLabel));
  }
  for (int64_t row = 0; found.nearest && row < count; ++row) {
    text += numbered(found, static_cast<size_t>(row), kLabel) + "\n";
    for (const auto& [id, similarity] : neighbours_of(*found.nearest, row)) {
      text += fmt::format("{:>8.4f} {:>8}  {}\n", similarity, id, token_label(id, tokenizer));
    }
  }
  return text + fmt::format("{} vector{} of {}, {}\n",
                            count,
                            count == 1 ? "" : "s",
                            found.vectors.size(1),
                            found.what);
}

std::string embedded_page(const Embedded& found, const std::optional<Tokenizer>& tokenizer) {
  const auto count = found.labels.size();
  auto body = fmt::format(
      "<h1>gemma embed</h1><p>{} vectors of {}, {}.</p>{}<main>",
      count,
      found.vectors.size(1),
      escape_html(found.what),
      count > kMapped
          ? fmt::format("<p class=\"note\">No map of similarities: it has room for {}.</p>",
                        kMapped)
          : "");
  if (count >= 2 && count <= kMapped) {
    body += similarity_html(found);
  }
  if (count >= 3) {
    body += axes_html(found);
  }
  if (found.nearest) {
    body += nearest_html(found, tokenizer);
  }
  return html_page("gemma embed", body + "</main>");
}

}  // namespace gemma_torch::apps
