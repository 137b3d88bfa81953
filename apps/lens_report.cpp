#include "lens_report.h"

#include <fmt/format.h>

#include <cmath>

#include "heatmap.h"
#include "page.h"
#include "tensor_json.h"
#include "token_labels.h"

namespace gemma_torch::apps {
namespace {

constexpr size_t kNumbered = 24;  // columns; texts in more would make a page of 2 MB

// "embed", "0", "1", ..
std::vector<std::string> depth_names(const Lens& lens) {
  auto names = indices(lens.kl.size(0) - 1);
  names.insert(names.begin(), "embed");
  return names;
}

std::vector<int64_t> as_ids(const at::Tensor& x) {
  std::vector<int64_t> ids;
  for (const auto id : numbers(x)) {
    ids.push_back(static_cast<int64_t>(id));
  }
  return ids;
}

nlohmann::json pieces_of(const at::Tensor& ids, const std::optional<Tokenizer>& tokenizer) {
  if (!tokenizer) {
    return {};
  }
  if (ids.dim() == 1) {
    return pieces_json(as_ids(ids), tokenizer);
  }
  auto rows = nlohmann::json::array();
  for (int64_t row = 0; row < ids.size(0); ++row) {
    rows.push_back(pieces_of(ids[row], tokenizer));
  }
  return rows;
}

// Numbers that mean "none" become null.
nlohmann::json without(nlohmann::json value, const nlohmann::json& none) {
  if (value == none) {
    return {};
  }
  if (value.is_array()) {
    for (auto& element : value) {
      element = without(std::move(element), none);
    }
  }
  return value;
}

bool follows_next_token(const Explainable& of) {
  return of.tokens.empty();
}

// Of the targets at one depth and position: " rank 12 p 0.031".
std::string targets_text(const Lens& lens, int64_t depth, int64_t position) {
  std::string text;
  for (int64_t m = 0; m < lens.targets.size(1); ++m) {
    const auto rank = lens.target_ranks[depth][position][m].item<int64_t>();
    const auto log_prob = lens.target_log_probs[depth][position][m].item<double>();
    text += rank == 0 ? fmt::format("{:>17}", "")
                      : fmt::format("{:>9} {:>7.4f}", rank, std::exp(log_prob));
  }
  return text;
}

Heatmap top_map(const Lens& lens, const Explainable& of) {
  Heatmap map{.title = "Likeliest next token",
              .note = "colour: its probability",
              .row_title = "layer",
              .column_title = "position",
              .rows = depth_names(lens),
              .columns = token_labels(of.ids, of.loaded.tokenizer),
              .values = numbers(lens.top_log_probs.select(/*dim=*/2, 0).exp())};
  map.texts = token_labels(as_ids(lens.top_ids.select(/*dim=*/2, 0)), of.loaded.tokenizer);
  return map;
}

Heatmap rank_map(const Lens& lens, const Explainable& of, int64_t m) {
  const auto ranks = lens.target_ranks.select(/*dim=*/2, m);
  const auto log_ranks = ranks.to(at::kDouble).masked_fill(ranks.eq(0), NAN).log10();
  Heatmap map{.title = "Rank of the token that follows",
              .note = "1: the likeliest; colour: log10 of the rank; grey: none follows",
              .row_title = "layer",
              .column_title = "position",
              .rows = depth_names(lens),
              .columns = token_labels(of.ids, of.loaded.tokenizer),
              .values = numbers(log_ranks)};
  if (!follows_next_token(of)) {
    const auto token = of.tokens[static_cast<size_t>(m)];
    map.title = "Rank of " + token_label(token, of.loaded.tokenizer);
    map.note = "1: the likeliest; colour: log10 of the rank";
  }
  if (of.ids.size() <= kNumbered) {
    for (const auto rank : as_ids(ranks)) {
      map.texts.push_back(rank == 0 ? "" : std::to_string(rank));
    }
  }
  return map;
}

Heatmap kl_map(const Lens& lens, const Explainable& of) {
  Heatmap map{.title = "KL from the last layer",
              .note =
                  "of each layer's distribution from the model's own, nats; colour: log10(1 + "
                  "KL), the first layers being far away",
              .row_title = "layer",
              .column_title = "position",
              .rows = depth_names(lens),
              .columns = token_labels(of.ids, of.loaded.tokenizer),
              .values = numbers((1 + lens.kl).log10())};
  if (of.ids.size() <= kNumbered) {
    for (const auto kl : numbers(lens.kl)) {
      map.texts.push_back(fmt::format("{:.2f}", kl));
    }
  }
  return map;
}

}  // namespace

nlohmann::json lens_json(const Lens& lens, const Explainable& of) {
  return {{"ids", of.ids},
          {"pieces", pieces_json(of.ids, of.loaded.tokenizer)},
          {"depths", depth_names(lens)},
          {"top_ids", tensor_json(lens.top_ids)},
          {"top_pieces", pieces_of(lens.top_ids, of.loaded.tokenizer)},
          {"top_logits", tensor_json(lens.top_logits)},
          {"top_logprobs", tensor_json(lens.top_log_probs)},
          {"targets", without(tensor_json(lens.targets), -1)},
          {"target_logprobs", tensor_json(lens.target_log_probs)},
          {"target_ranks", without(tensor_json(lens.target_ranks), 0)},
          {"kl", tensor_json(lens.kl)}};
}

std::string lens_text(const Lens& lens, const Explainable& of) {
  const auto& tokenizer = of.loaded.tokenizer;
  const auto names = depth_names(lens);
  const auto T = lens.kl.size(1), p = of.position;
  const auto top = lens.top_ids.select(/*dim=*/2, 0);  // (N, T)
  auto text = fmt::format("{:>5} | {:^20} | after {}\n{:>5} | {:>9} {:>10} | {:>9} {:>7} {:<18}",
                          "",
                          fmt::format("over {} positions", T),
                          of.token_at_position(),
                          "layer",
                          "mean KL",
                          "same top",
                          "KL",
                          "p",
                          "likeliest");
  for (const auto id : as_ids(lens.targets[p])) {
    text += id < 0 ? std::string(17, ' ')
                   : fmt::format("{:>17}", "rank, p " + shortened(token_label(id, tokenizer), 8));
  }
  text += "\n";
  for (size_t n = 0; n < names.size(); ++n) {
    const auto depth = static_cast<int64_t>(n);
    const auto same = top[depth].eq(top[-1]).to(at::kDouble).mean().item<double>();
    const auto label = shortened(token_label(top[depth][p].item<int64_t>(), tokenizer), 17);
    const auto log_prob = lens.top_log_probs[depth][p][0].item<double>();
    text += fmt::format("{:>5} | {:>9.4f} {:>8.1f} % | {:>9.4f} {:>7.4f} {}{}{}\n",
                        names[n],
                        lens.kl[depth].mean().item<double>(),
                        100 * same,
                        lens.kl[depth][p].item<double>(),
                        std::exp(log_prob),
                        label,
                        std::string(18 - characters(label), ' '),
                        targets_text(lens, depth, p));
  }
  return text;
}

std::string lens_page(const Lens& lens, const Explainable& of) {
  auto body = fmt::format(
      "<h1>Logit lens</h1>\n<p>Prompt: <code>{}</code></p>\n<p class=\"note\">Each row is what the "
      "model would predict had it ended after that layer: its residual stream through the final "
      "norm and the output head. A dot in a token is a space.</p>\n<main>\n",
      escape_html(prompt_text(of.ids, of.loaded.tokenizer)));
  body += heatmap_html(top_map(lens, of));
  for (int64_t m = 0; m < lens.targets.size(1); ++m) {
    body += heatmap_html(rank_map(lens, of, m));
  }
  body += heatmap_html(kl_map(lens, of));
  return html_page("Logit lens", body + "</main>\n");
}

}  // namespace gemma_torch::apps
