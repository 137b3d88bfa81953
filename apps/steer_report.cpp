#include "steer_report.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "common.h"
#include "heatmap.h"
#include "line_chart.h"
#include "page.h"
#include "token_labels.h"

namespace gemma_torch::apps {
namespace {

nlohmann::json tokens_json(const std::vector<int64_t>& ids, const MeasureCase& of) {
  auto tokens = nlohmann::json::array();
  for (const auto id : ids) {
    tokens.push_back({{"id", id}, {"piece", piece_json(id, of.tokenizer)}});
  }
  return tokens;
}

std::string tokens_text(const std::vector<int64_t>& ids, const MeasureCase& of) {
  return fmt::format("{}", fmt::join(token_labels(ids, of.tokenizer), " "));
}

std::string score_name(const MeasureCase& of) {
  return fmt::format(
      "ln P({}) / P({})", tokens_text(of.options.toward, of), tokens_text(of.options.away, of));
}

std::string layers_text(const MeasureCase& of) {
  return of.options.layers.empty() ? "all its layers"
                                   : fmt::format("layer{} {}",
                                                 of.options.layers.size() == 1 ? "" : "s",
                                                 fmt::join(of.options.layers, ", "));
}

std::string chart(const std::vector<MeasureRow>& rows, const MeasureCase& of) {
  LineChart chart{.title = "Score over strength",
                  .note = "Dark: the mean. Pale: each prompt.",
                  .x_title = "strength",
                  .y_title = "score"};
  ChartLine mean{.name = "mean", .strong = true};
  chart.lines.resize(of.prompts.size());
  for (const auto& row : rows) {
    chart.x.push_back(row.strength);
    mean.y.push_back(row.mean);
    for (size_t i = 0; i < row.scores.size(); ++i) {
      chart.lines[i].y.push_back(row.scores[i]);
    }
  }
  for (size_t i = 0; i < of.prompts.size(); ++i) {
    chart.lines[i].name = prompt_text(of.prompts[i], of.tokenizer);
  }
  chart.lines.push_back(mean);
  return rows.size() < 2 ? "" : line_chart_html(chart);
}

std::string map(const std::vector<MeasureRow>& rows, const MeasureCase& of) {
  Heatmap map{.title = "Score of each prompt",
              .note = "Prompts are numbered from the bottom; their texts are below.",
              .row_title = "prompt",
              .column_title = "strength"};
  for (const auto& row : rows) {
    map.columns.push_back(fmt::format("{:g}", row.strength));
  }
  for (size_t i = 0; i < of.prompts.size(); ++i) {
    map.rows.push_back(std::to_string(i + 1));
    for (const auto& row : rows) {
      map.values.push_back(row.scores[i]);
    }
  }
  return heatmap_html(map);
}

}  // namespace

nlohmann::json measure_json(const std::vector<MeasureRow>& rows, const MeasureCase& of) {
  auto prompts = nlohmann::json::array();
  for (const auto& ids : of.prompts) {
    prompts.push_back({{"ids", ids}, {"pieces", pieces_json(ids, of.tokenizer)}});
  }
  auto list = nlohmann::json::array();
  for (const auto& row : rows) {
    list.push_back(
        {{"strength", row.strength}, {"mean", row.mean}, {"kl", row.kl}, {"scores", row.scores}});
  }
  return {{"direction", of.direction},
          {"layers", of.options.layers},
          {"keep_norm", of.options.keep_norm},
          {"tokens", tokens_json(of.options.toward, of)},
          {"against", tokens_json(of.options.away, of)},
          {"prompts", prompts},
          {"rows", list},
          {"grows", grows_with_strength(rows)}};
}

std::string measure_text(const std::vector<MeasureRow>& rows, const MeasureCase& of) {
  auto text = fmt::format("{} after {} prompts; {} at {}\n{:>9} {:>9} {:>9} {:>9} {:>9}\n",
                          score_name(of),
                          of.prompts.size(),
                          of.direction,
                          layers_text(of),
                          "strength",
                          "mean",
                          "lowest",
                          "highest",
                          "KL");
  for (const auto& row : rows) {
    const auto [low, high] = std::minmax_element(row.scores.begin(), row.scores.end());
    text += fmt::format("{:>9g} {:>9.4f} {:>9.4f} {:>9.4f} {:>9.4f}\n",
                        row.strength,
                        row.mean,
                        *low,
                        *high,
                        row.kl);
  }
  return text;
}

std::string measure_page(std::vector<MeasureRow> rows, const MeasureCase& of) {
  std::sort(rows.begin(), rows.end(), [](const MeasureRow& a, const MeasureRow& b) {
    return a.strength < b.strength;
  });
  auto body = fmt::format(
      "<h1>Steering</h1>\n<p>Direction: <code>{}</code>, added at {}.</p>\n<p>Score: "
      "<code>{}</code> of the next token. A dot in a token is a space.</p>\n<main>\n{}{}"
      "<section><h2>Prompts</h2>\n<ol>\n",
      escape_html(of.direction),
      layers_text(of),
      escape_html(score_name(of)),
      chart(rows, of),
      map(rows, of));
  for (const auto& ids : of.prompts) {
    body += fmt::format("<li><code>{}</code></li>\n", escape_html(prompt_text(ids, of.tokenizer)));
  }
  return html_page("Steering: " + score_name(of), body + "</ol></section></main>\n");
}

}  // namespace gemma_torch::apps
