#include "patch_sweep.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "common.h"
#include "gemma_torch/base/error.h"
#include "heatmap.h"
#include "page.h"
#include "tensor_json.h"
#include "token_labels.h"

namespace gemma_torch::apps {
namespace {

using OptionalTokenizer = std::optional<Tokenizer>;

constexpr size_t kShown = 5;  // places of each map on a terminal

std::string score_name(const SweepCase& of, const OptionalTokenizer& tokenizer) {
  return "logit " + difference_label(of.tokens, tokenizer);
}

// "France" where the prompts agree, else "France|Italy".
std::vector<std::string> position_labels(const SweepCase& of, const OptionalTokenizer& tokenizer) {
  std::vector<std::string> labels;
  for (size_t i = 0; i < of.clean.size(); ++i) {
    const auto clean = token_label(of.clean[i], tokenizer);
    const bool same = of.clean[i] == of.corrupted[i];
    labels.push_back(same ? clean : clean + "|" + token_label(of.corrupted[i], tokenizer));
  }
  return labels;
}

}  // namespace

std::vector<Site> sweep_sites(const std::vector<std::string>& names) {
  std::vector<Site> sites;
  for (const auto& name : names) {
    const auto found = find_site(name);
    check(found.has_value(),
          "[sweep] sites: expected some of {}, got {}",
          fmt::join(kSiteNames, ", "),
          name);
    sites.push_back(*found);
  }
  return sites;
}

nlohmann::json sweep_json(const Sweep& sweep,
                          const SweepCase& of,
                          const OptionalTokenizer& tokenizer) {
  auto maps = nlohmann::json::array();
  for (const auto& map : sweep.maps) {
    maps.push_back({{"site", site_name(map.site, /*layer=*/-1)},
                    {"columns", map.by_head ? "head" : "position"},
                    {"scores", tensor_json(map.scores)},
                    {"normalised", tensor_json(sweep.normalised(map))}});
  }
  auto tokens = nlohmann::json::array();
  for (const auto id : of.tokens) {
    tokens.push_back({{"id", id}, {"piece", piece_json(id, tokenizer)}});
  }
  return {{"ids", of.clean},
          {"pieces", pieces_json(of.clean, tokenizer)},
          {"corrupted_ids", of.corrupted},
          {"corrupted_pieces", pieces_json(of.corrupted, tokenizer)},
          {"tokens", tokens},
          {"clean", sweep.clean},
          {"corrupted", sweep.corrupted},
          {"maps", maps}};
}

std::string sweep_text(const Sweep& sweep,
                       const SweepCase& of,
                       const OptionalTokenizer& tokenizer) {
  auto text = fmt::format("{}: clean {:.3f}, corrupted {:.3f}\n",
                          score_name(of, tokenizer),
                          sweep.clean,
                          sweep.corrupted);
  const auto labels = position_labels(of, tokenizer);
  for (const auto& map : sweep.maps) {
    const auto values = numbers(sweep.normalised(map));
    const auto columns = static_cast<size_t>(map.scores.size(1));
    std::vector<size_t> order(values.size());
    std::iota(order.begin(), order.end(), size_t{0});
    const auto shown = std::min(kShown, order.size());
    std::partial_sort(
        order.begin(),
        order.begin() + static_cast<int64_t>(shown),
        order.end(),
        [&](size_t a, size_t b) { return std::abs(values[a]) > std::abs(values[b]); });
    text +=
        fmt::format("{} of the clean run (0: as corrupted, 1: as clean), where it moves most:\n",
                    site_name(map.site, /*layer=*/-1));
    for (size_t i = 0; i < shown; ++i) {
      const auto column = order[i] % columns;
      text += fmt::format("  {:>7.3f}  layer {:>2}, {} {}{}\n",
                          values[order[i]],
                          order[i] / columns,
                          map.by_head ? "head" : "position",
                          column,
                          map.by_head ? "" : " " + labels[column]);
    }
  }
  return text;
}

std::string sweep_page(const Sweep& sweep,
                       const SweepCase& of,
                       const OptionalTokenizer& tokenizer) {
  auto body = fmt::format(
      "<h1>Activation patching</h1>\n<p>Clean: <code>{}</code></p>\n"
      "<p>Corrupted: <code>{}</code></p>\n<p>Score: <code>{}</code> at the last position; clean "
      "run {:.3f}, corrupted run {:.3f}.</p>\n<p class=\"note\">Each cell: the corrupted run with "
      "one value of the clean run in its place. 0: the score stays the corrupted run's; 1: it "
      "becomes the clean run's. A dot in a token is a space.</p>\n<main>\n",
      escape_html(prompt_text(of.clean, tokenizer)),
      escape_html(prompt_text(of.corrupted, tokenizer)),
      escape_html(score_name(of, tokenizer)),
      sweep.clean,
      sweep.corrupted);
  for (const auto& map : sweep.maps) {
    const auto site = site_name(map.site, /*layer=*/-1);
    body += heatmap_html(
        {.title = site,
         .note = map.by_head ? "one head, at all positions" : "one position",
         .row_title = "layer",
         .column_title = map.by_head ? "head" : "position (clean|corrupted where they differ)",
         .rows = indices(map.scores.size(0)),
         .columns = map.by_head ? indices(map.scores.size(1)) : position_labels(of, tokenizer),
         .values = numbers(sweep.normalised(map))});
  }
  return html_page("Activation patching: " + score_name(of, tokenizer), body + "</main>\n");
}

}  // namespace gemma_torch::apps
