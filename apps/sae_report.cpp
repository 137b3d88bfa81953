#include "sae_report.h"

#include <fmt/format.h>

#include <cmath>

#include "common.h"
#include "page.h"
#include "tensor_json.h"
#include "token_labels.h"

namespace gemma_torch::apps {
namespace {

std::string sites_text(const SaeSites& sites) {
  const auto input = sites.input.name(), output = sites.output.name();
  return input == output ? input : input + " \u2192 " + output;
}

// The active ones of a token's top features.
nlohmann::json top_json(const TopFeatures& top, int64_t token) {
  auto list = nlohmann::json::array();
  for (int64_t i = 0; i < top.features.size(1); ++i) {
    const auto activation = top.activations[token][i].item<double>();
    if (activation > 0) {
      list.push_back(
          {{"feature", top.features[token][i].item<int64_t>()}, {"activation", activation}});
    }
  }
  return list;
}

}  // namespace

nlohmann::json encode_json(const Encoded& encoded, const EncodeCase& of) {
  auto top = nlohmann::json::array();
  for (int64_t token = 0; token < encoded.top.features.size(0); ++token) {
    top.push_back(top_json(encoded.top, token));
  }
  auto features = nlohmann::json::array();
  for (size_t i = 0; i < of.features.size(); ++i) {
    const auto column = encoded.activations.select(/*dim=*/1, static_cast<int64_t>(i));
    features.push_back({{"feature", of.features[i]}, {"activations", tensor_json(column)}});
  }
  return {{"sae", of.file},
          {"input", of.sites.input.name()},
          {"output", of.sites.output.name()},
          {"ids", of.ids},
          {"pieces", pieces_json(of.ids, of.tokenizer)},
          {"l0", encoded.fit.l0},
          {"explained", encoded.fit.explained},
          {"top", top},
          {"features", features}};
}

std::string encode_text(const Encoded& encoded, const EncodeCase& of) {
  auto text = fmt::format("{}: {:.1f} features a token, {:.1f} % explained\n",
                          sites_text(of.sites),
                          encoded.fit.l0,
                          100 * encoded.fit.explained);
  for (size_t token = 0; token < of.ids.size(); ++token) {
    text += fmt::format("{:<18}", shortened(token_label(of.ids[token], of.tokenizer), 16));
    for (const auto& row : top_json(encoded.top, static_cast<int64_t>(token))) {
      text += fmt::format(
          " {:>7}:{:<8.4g}", row["feature"].get<int64_t>(), row["activation"].get<double>());
    }
    text.erase(text.find_last_not_of(' ') + 1);
    text += "\n";
  }
  return text;
}

std::string encode_page(const Encoded& encoded, const EncodeCase& of) {
  auto body = fmt::format(
      "<h1>Features of a text</h1>\n<p>Autoencoder: <code>{}</code> at <code>{}</code></p>\n"
      "<p class=\"note\">{:.1f} features a token are active; together they explain {:.1f} % of the "
      "value's variance. A grey BOS is off the scale.</p>\n",
      escape_html(of.file),
      escape_html(sites_text(of.sites)),
      encoded.fit.l0,
      100 * encoded.fit.explained);
  std::vector<std::string> tokens;
  for (const auto id : of.ids) {
    tokens.push_back(token_text(id, of.tokenizer));
  }
  for (size_t i = 0; i < of.features.size(); ++i) {
    auto values = numbers(encoded.activations.select(/*dim=*/1, static_cast<int64_t>(i)));
    size_t active = 0;
    std::vector<std::string> captions;
    for (const auto value : values) {
      active += value > 0 ? 1 : 0;
      captions.push_back(fmt::format("{:.4f}", value));
    }
    const bool bos = of.tokenizer && of.ids[0] == of.tokenizer->bos_id() && of.ids.size() > 1;
    values[0] = bos ? std::nan("") : values[0];  // tens of times the others': grey, off the scale
    body +=
        coloured_text_html({.title = fmt::format("Feature {}", of.features[i]),
                            .note = fmt::format("active at {} of {} tokens", active, values.size()),
                            .tokens = tokens,
                            .values = values,
                            .captions = captions});
  }
  return html_page("Features of a text", body);
}

nlohmann::json loss_json(const LossCase& of) {
  return {{"sae", of.file},
          {"input", of.sites.input.name()},
          {"output", of.sites.output.name()},
          {"tokens", of.tokens},
          {"nll", of.plain},
          {"nll_reconstructed", of.reconstructed},
          {"nll_zeroed", of.zeroed},
          {"increase", of.reconstructed - of.plain},
          {"recovered", of.recovered()}};
}

std::string loss_text(const LossCase& of) {
  return fmt::format(
      "{}: loss {:.4f} as it is, {:.4f} with the autoencoder's output ({:+.4f}), {:.4f} with "
      "zeros; {:.1f} % recovered\n",
      sites_text(of.sites),
      of.plain,
      of.reconstructed,
      of.reconstructed - of.plain,
      of.zeroed,
      100 * of.recovered());
}

}  // namespace gemma_torch::apps
