#include "patch_sweep.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "common.h"
#include "gemma_torch/base/error.h"
#include "page.h"

namespace gemma_torch::apps {
namespace {

using OptionalTokenizer = std::optional<Tokenizer>;

constexpr size_t kShown = 5;  // places of each map on a terminal

void replace_all(std::string& text, std::string_view what, std::string_view with) {
  for (size_t at = 0; (at = text.find(what, at)) != std::string::npos; at += with.size()) {
    text.replace(at, what.size(), with);
  }
}

// A token for people: its piece with a small dot for a space and an arrow for a line's end; its id
// where there are no pieces.
std::string label(int64_t id, const OptionalTokenizer& tokenizer) {
  if (!tokenizer) {
    return std::to_string(id);
  }
  auto piece = tokenizer->piece(id);
  replace_all(piece, "\u2581", "\u00b7");
  replace_all(piece, "\n", "\u21b5");
  return piece;
}

std::string score_name(const SweepCase& of, const OptionalTokenizer& tokenizer) {
  auto name = "logit " + label(of.tokens[0], tokenizer);
  return of.tokens.size() < 2 ? name : name + " \u2212 " + label(of.tokens[1], tokenizer);
}

std::vector<double> numbers(const at::Tensor& table) {
  const auto flat = table.contiguous();
  return {flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel()};
}

nlohmann::json rows_json(const at::Tensor& table) {
  auto rows = nlohmann::json::array();
  for (int64_t row = 0; row < table.size(0); ++row) {
    rows.push_back(numbers(table[row]));
  }
  return rows;
}

// "France" where the prompts agree, else "France|Italy".
std::vector<std::string> position_labels(const SweepCase& of, const OptionalTokenizer& tokenizer) {
  std::vector<std::string> labels;
  for (size_t i = 0; i < of.clean.size(); ++i) {
    const auto clean = label(of.clean[i], tokenizer);
    const bool same = of.clean[i] == of.corrupted[i];
    labels.push_back(same ? clean : clean + "|" + label(of.corrupted[i], tokenizer));
  }
  return labels;
}

std::vector<std::string> indices(int64_t n) {
  std::vector<std::string> names;
  for (int64_t i = 0; i < n; ++i) {
    names.push_back(std::to_string(i));
  }
  return names;
}

std::string prompt_html(const std::vector<int64_t>& ids, const OptionalTokenizer& tokenizer) {
  return escape_html(tokenizer ? tokenizer->decode(ids) : fmt::format("{}", fmt::join(ids, ",")));
}

}  // namespace

std::vector<Site> sweep_sites(const std::vector<std::string>& names) {
  std::vector<Site> sites;
  for (const auto& name : names) {
    const auto found = std::find(kSiteNames.begin(), kSiteNames.end(), name);
    check(found != kSiteNames.end(),
          "[sweep] sites: expected some of {}, got {}",
          fmt::join(kSiteNames, ", "),
          name);
    sites.push_back(static_cast<Site>(found - kSiteNames.begin()));
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
                    {"scores", rows_json(map.scores)},
                    {"normalised", rows_json(sweep.normalised(map))}});
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
      prompt_html(of.clean, tokenizer),
      prompt_html(of.corrupted, tokenizer),
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
