#include "gemma_torch/inspect/saliency.h"

#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>

#include "common.h"
#include "explain_flags.h"
#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/inspect/integrated_gradients.h"
#include "gemma_torch/io/safetensors.h"
#include "page.h"
#include "tensor_json.h"
#include "token_labels.h"

namespace gemma_torch::apps {
namespace {

constexpr int64_t kPad = 0;  // <pad> of every Gemma 3

struct SaliencyFlags {
  ExplainOptions explain = {};
  std::string of = "logit";
  std::string method = "integrated";
  std::string baseline = "pad";
  bool replace_first = false;
  IntegrationOptions integration = {};
  std::string out = {};
};

// Either method's scores, and what is said of them.
struct Scored {
  SaliencyTarget target = {};
  Saliency gradient = {};
  std::optional<IntegratedGradients> integrated = {};

  const at::Tensor& scores() const { return integrated ? integrated->scores : gradient.scores; }
  double value() const { return integrated ? integrated->value : gradient.value; }
};

SaliencyTarget target_of(const SaliencyFlags& flags, const Explainable& of) {
  SaliencyTarget target{.tokens = of.tokens, .position = of.position};
  if (flags.of == "loss") {
    check(of.tokens.empty(), "[saliency] --tokens: expected none with --of loss, whose are all");
    target.of = Explained::kLoss;
    return target;
  }
  target.of = flags.of == "logit" ? Explained::kLogit : Explained::kLogProb;
  if (target.tokens.empty()) {
    target.tokens = {likeliest_next(of)};
  }
  return target;
}

at::Tensor baseline_of(const std::string& name, const Gemma3Model& model) {
  const auto& table = model->tok_emb->weight;
  if (name == "pad") {
    return embeddings_of(model, {kPad})[0];
  }
  if (name == "zero") {
    return at::zeros({table.size(1)}, table.options());
  }
  return table.detach().mean(/*dim=*/0) * std::sqrt(static_cast<double>(table.size(1)));
}

IntegratedGradients integrate(const SaliencyFlags& flags,
                              const Explainable& of,
                              const SaliencyTarget& target) {
  auto options = flags.integration;
  options.baseline = baseline_of(flags.baseline, of.loaded.model);
  options.keep_first = !flags.replace_first;
  Progress progress("gradients");
  options.on_progress = [&](int64_t done, int64_t most) {
    progress.show(done, most);
    return !interrupted();
  };
  catch_interrupt();
  return integrated_gradients(of.loaded.model, of.ids, target, options);
}

std::string target_name(const Scored& found, const Explainable& of) {
  if (found.target.of == Explained::kLoss) {
    return "loss of the text";
  }
  return fmt::format("{} {} after {}",
                     found.target.of == Explained::kLogit ? "logit" : "log-probability",
                     difference_label(found.target.tokens, of.loaded.tokenizer),
                     of.token_at_position());
}

nlohmann::json saliency_json(const SaliencyFlags& flags,
                             const Scored& found,
                             const Explainable& of) {
  const auto& tokenizer = of.loaded.tokenizer;
  auto tokens = nlohmann::json::array();
  for (const auto id : found.target.tokens) {
    tokens.push_back({{"id", id}, {"piece", piece_json(id, tokenizer)}});
  }
  nlohmann::json value = {{"ids", of.ids},
                          {"pieces", pieces_json(of.ids, tokenizer)},
                          {"of", flags.of},
                          {"method", flags.method},
                          {"tokens", tokens},
                          {"position", of.position},
                          {"value", found.value()},
                          {"scores", tensor_json(found.scores())}};
  if (found.integrated) {
    value["baseline"] = flags.baseline;
    value["baseline_value"] = found.integrated->baseline;
    value["steps"] = found.integrated->steps;
    value["completeness_error"] = found.integrated->completeness_error();
  } else {
    value["gradient_norms"] = tensor_json(found.gradient.norms);
  }
  return value;
}

// What the numbers are, in a line.
std::string summary(const SaliencyFlags& flags, const Scored& found) {
  if (!found.integrated) {
    return fmt::format("gradient x input, where it is {:.4f}", found.gradient.value);
  }
  const auto& result = *found.integrated;
  return fmt::format(
      "integrated gradients, {} baseline{}: {:.4f} there, {:.4f} here, the scores' sum {:.4f} "
      "({:.2f} % off{}) after {} gradients",
      flags.baseline,
      flags.replace_first ? "" : " but for the first token",
      result.baseline,
      result.value,
      result.scores.sum().item<double>(),
      100 * result.completeness_error(),
      result.completeness_error() > flags.integration.tolerance
          ? ", more than the tolerance: more --steps, or another --baseline"
          : "",
      result.steps);
}

std::string saliency_text(const SaliencyFlags& flags, const Scored& found, const Explainable& of) {
  const auto scores = numbers(found.scores());
  auto text = target_name(found, of) + "\n" + summary(flags, found) + "\n";
  for (size_t i = 0; i < scores.size(); ++i) {
    text += fmt::format(
        "{:>6} {:>9.4f}  {}\n", i, scores[i], token_label(of.ids[i], of.loaded.tokenizer));
  }
  return text;
}

std::string saliency_page(const SaliencyFlags& flags, const Scored& found, const Explainable& of) {
  const auto name = target_name(found, of);
  ColouredText text{
      .title = name, .note = summary(flags, found), .values = numbers(found.scores())};
  for (size_t i = 0; i < of.ids.size(); ++i) {
    text.tokens.push_back(token_text(of.ids[i], of.loaded.tokenizer));
    text.captions.push_back(fmt::format(
        "{}: {:.4f}, {}", i, text.values[i], token_label(of.ids[i], of.loaded.tokenizer)));
  }
  return html_page("Saliency: " + name,
                   "<h1>Saliency</h1>\n<p class=\"note\">Red tokens raise the number, blue ones "
                   "lower it; under the pointer: position, score, token.</p>\n" +
                       coloured_text_html(text));
}

void write_tensors(const SaliencyFlags& flags, const Scored& found) {
  TensorMap tensors = {{"scores", found.scores()}};
  if (!found.integrated) {
    tensors["embed"] = found.gradient.embed.cpu();
    tensors["gradient"] = found.gradient.gradient.cpu();
  }
  save_safetensors(flags.out, tensors, {{"of", flags.of}, {"method", flags.method}});
}

void run_saliency(const SaliencyFlags& flags) {
  const auto of = read_explainable("saliency", flags.explain);
  Scored found{.target = target_of(flags, of)};
  if (flags.method == "integrated") {
    found.integrated = integrate(flags, of, found.target);
  } else {
    found.gradient = gradient_times_input(of.loaded.model, of.ids, found.target);
  }
  if (!flags.out.empty()) {
    write_tensors(flags, found);
  }
  if (!flags.explain.html.empty()) {
    write_file(flags.explain.html, saliency_page(flags, found, of));
  }
  if (flags.explain.json) {
    print_json(saliency_json(flags, found, of));
  } else {
    print_text(saliency_text(flags, found, of));
  }
}

}  // namespace

void add_saliency(CLI::App& app) {
  auto* command = app.add_subcommand(
      "saliency", "how much each token of a prompt moves a logit, a probability or the loss");
  auto flags = std::make_shared<SaliencyFlags>();
  auto& integration = flags->integration;
  add_explain_flags(*command, flags->explain);
  command->get_option("--tokens")
      ->description(
          "' Paris, Rome': one token or two, whose number or difference is explained "
          "[the likeliest next one]");
  const auto choice = [&](const char* name, std::string& target, const char* help) {
    return command->add_option(name, target, help)->capture_default_str();
  };
  choice("--of", flags->of, "logit, logprob, or loss: the mean of all tokens")
      ->check(CLI::IsMember({"logit", "logprob", "loss"}));
  choice("--method", flags->method, "integrated (gradients), or gradient (times the input)")
      ->check(CLI::IsMember({"integrated", "gradient"}));
  choice("--baseline", flags->baseline, "where the path starts: pad, zero or mean embedding")
      ->check(CLI::IsMember({"pad", "zero", "mean"}));
  command->add_flag("--replace-first",
                    flags->replace_first,
                    "the baseline in place of the first token (BOS) too");
  command
      ->add_option("--tolerance",
                   integration.tolerance,
                   "of the completeness error, a share: the path is refined until it is met")
      ->capture_default_str();
  command->add_option("--steps", integration.steps, "gradients at most")->capture_default_str();
  command->add_option("--batch-tokens", integration.tokens, "tokens of a pass: its memory")
      ->capture_default_str();
  command->add_option(
      "-o,--out",
      flags->out,
      "safetensors: scores (T), and of --method gradient gradient and embed (T, E)");
  command->callback([flags] { run_saliency(*flags); });
}

}  // namespace gemma_torch::apps
