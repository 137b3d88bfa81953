#include "attribution_report.h"

#include <ATen/ops/cat.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "heatmap.h"
#include "page.h"
#include "tensor_json.h"
#include "token_labels.h"

namespace gemma_torch::apps {
namespace {

struct NamedPart {
  std::string name = {};
  double value = 0;
};

std::string target_name(const Explainable& of, bool less_mean) {
  return "logit " + difference_label(of.tokens, of.loaded.tokenizer) +
         (less_mean ? " \u2212 mean" : "");
}

std::vector<NamedPart> largest(std::vector<NamedPart> parts, int64_t top) {
  const auto shown = std::min(static_cast<int64_t>(parts.size()), top);
  std::partial_sort(
      parts.begin(),
      parts.begin() + shown,
      parts.end(),
      [](const NamedPart& a, const NamedPart& b) { return std::abs(a.value) > std::abs(b.value); });
  parts.resize(static_cast<size_t>(shown));
  return parts;
}

std::vector<NamedPart> parts_of(const Attribution& found) {
  std::vector<NamedPart> parts = {{"embed", found.embed}};
  for (int64_t layer = 0; layer < found.heads.size(0); ++layer) {
    for (int64_t head = 0; head < found.heads.size(1); ++head) {
      parts.push_back({fmt::format("layer {:>2} head {}", layer, head),
                       found.heads[layer][head].item<double>()});
    }
    parts.push_back({fmt::format("layer {:>2} mlp", layer), found.mlp[layer].item<double>()});
  }
  return parts;
}

std::vector<NamedPart> neurons_of(const Attribution& found, int64_t top) {
  const auto F = found.neurons.size(1);
  const auto order =
      found.neurons.abs().view({-1}).topk(std::min(top, found.neurons.numel()));  // fast: 36,864
  std::vector<NamedPart> parts;
  for (const auto place : numbers(std::get<1>(order))) {
    const auto layer = static_cast<int64_t>(place) / F, neuron = static_cast<int64_t>(place) % F;
    parts.push_back({fmt::format("layer {:>2} neuron {:>4}, activation {:.3f}",
                                 layer,
                                 neuron,
                                 found.activations[layer][neuron].item<double>()),
                     found.neurons[layer][neuron].item<double>()});
  }
  return parts;
}

std::string lines(const std::vector<NamedPart>& parts) {
  std::string text;
  for (const auto& part : parts) {
    text += fmt::format("  {:>9.4f}  {}\n", part.value, part.name);
  }
  return text;
}

// Rows of layers, columns of heads and the MLP.
Heatmap parts_map(const Attribution& found) {
  auto columns = indices(found.heads.size(1));
  columns.push_back("mlp");
  return {.title = "Heads and MLPs",
          .note = "what each adds to the logit",
          .row_title = "layer",
          .column_title = "head",
          .rows = indices(found.heads.size(0)),
          .columns = columns,
          .values = numbers(at::cat({found.heads, found.mlp.unsqueeze(1)}, /*dim=*/1))};
}

Heatmap neurons_map(const Attribution& found) {
  constexpr int64_t kShown = 12;
  const auto order = std::get<1>(
      found.neurons.abs().topk(std::min(kShown, found.neurons.size(1)), /*dim=*/1));  // (L, shown)
  Heatmap map{.title = "Largest neurons of each layer",
              .note = "in the cells their numbers, the largest first; colour: what each adds",
              .row_title = "layer",
              .column_title = "by size",
              .rows = indices(order.size(0)),
              .columns = indices(order.size(1)),
              .values = numbers(found.neurons.gather(/*dim=*/1, order))};
  for (const auto neuron : numbers(order)) {
    map.texts.push_back(fmt::format("{:.0f}", neuron));
  }
  return map;
}

}  // namespace

nlohmann::json attribution_json(const Attribution& found, const Explainable& of, bool less_mean) {
  auto tokens = nlohmann::json::array();
  for (const auto id : of.tokens) {
    tokens.push_back({{"id", id}, {"piece", piece_json(id, of.loaded.tokenizer)}});
  }
  return {{"ids", of.ids},
          {"pieces", pieces_json(of.ids, of.loaded.tokenizer)},
          {"position", of.position},
          {"tokens", tokens},
          {"less_mean", less_mean},
          {"value", found.value},
          {"sum", found.sum()},
          {"residual", found.residual()},
          {"embed", found.embed},
          {"attn", tensor_json(found.attn)},
          {"heads", tensor_json(found.heads)},
          {"mlp", tensor_json(found.mlp)},
          {"neurons", tensor_json(found.neurons)},
          {"activations", tensor_json(found.activations)}};
}

std::string attribution_text(const Attribution& found,
                             const Explainable& of,
                             bool less_mean,
                             int64_t top) {
  return fmt::format(
      "{} after {}: {:.4f}\nlargest of {} heads, {} MLPs and the embedding:\n{}largest of {} "
      "neurons, which are the MLPs in detail:\n{}sum of embedding, heads and neurons {:.6f}, "
      "residual {:.2e}; with MLPs and attention whole {:.2e}\n",
      target_name(of, less_mean),
      of.token_at_position(),
      found.value,
      found.heads.numel(),
      found.mlp.numel(),
      lines(largest(parts_of(found), top)),
      found.neurons.numel(),
      lines(neurons_of(found, top)),
      found.sum(),
      found.residual(),
      found.coarse_residual());
}

std::string attribution_page(const Attribution& found, const Explainable& of, bool less_mean) {
  auto body = fmt::format(
      "<h1>Direct logit attribution</h1>\n<p>Prompt: <code>{}</code></p>\n<p><code>{}</code> after "
      "{}: {:.4f}, of which the embedding {:.4f}, heads {:.4f}, MLPs {:.4f}; the sum of the parts "
      "leaves {:.1e}.</p>\n<p class=\"note\">Parts that only prepare what later layers use do not "
      "show here: each number is what a part writes straight to the logit, the norms' scales held "
      "as they are in this run.</p>\n<main>\n",
      escape_html(prompt_text(of.ids, of.loaded.tokenizer)),
      escape_html(target_name(of, less_mean)),
      escape_html(of.token_at_position()),
      found.value,
      found.embed,
      found.heads.sum().item<double>(),
      found.mlp.sum().item<double>(),
      found.residual());
  body += heatmap_html(parts_map(found)) + heatmap_html(neurons_map(found));
  return html_page("Direct logit attribution: " + target_name(of, less_mean), body + "</main>\n");
}

}  // namespace gemma_torch::apps
