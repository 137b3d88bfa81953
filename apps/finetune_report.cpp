#include "finetune_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "examples.h"
#include "line_chart.h"
#include "page.h"
#include "token_labels.h"

namespace gemma_torch::apps {
namespace {

using json = nlohmann::json;

constexpr int64_t kNewTokens = 48;
constexpr std::ptrdiff_t kOpening = 16;  // tokens of a whole text that are given
constexpr size_t kPoints = 800;          // of a curve; more steps are averaged

// One field of the log over steps, NaN where a line has none.
struct Curve {
  std::vector<double> steps, values;
};

Curve curve_of(const std::vector<json>& log, const char* name) {
  Curve curve;
  for (const auto& row : log) {
    if (row.contains(name)) {
      curve.steps.push_back(row.at("step").get<double>());
      curve.values.push_back(row.at(name).get<double>());
    }
  }
  const auto each = (curve.steps.size() + kPoints - 1) / kPoints;
  if (each <= 1) {
    return curve;
  }
  Curve fewer;
  for (size_t start = 0; start < curve.steps.size(); start += each) {
    const auto end = std::min(start + each, curve.steps.size());
    double sum = 0;
    for (size_t i = start; i < end; ++i) {
      sum += curve.values[i];
    }
    fewer.steps.push_back(curve.steps[end - 1]);
    fewer.values.push_back(sum / static_cast<double>(end - start));
  }
  return fewer;
}

std::string chart_html(const std::string& title, const std::string& y_title, const Curve& curve) {
  if (curve.steps.size() < 2) {
    return {};
  }
  return line_chart_html({.title = title,
                          .note = {},
                          .x_title = "optimiser step",
                          .y_title = y_title,
                          .x = curve.steps,
                          .lines = {{.name = title, .y = curve.values, .strong = true}}});
}

std::string samples_html(const json& before, const json& after) {
  std::string out;
  for (size_t i = 0; i < std::min(before.size(), after.size()); ++i) {
    const auto text = [](const json& sample, const char* name) {
      return "<code>" + escape_html(sample.value(name, "")) + "</code>";
    };
    out += fmt::format(
        "<p>{}</p><p class=\"note\">expected {}</p><p class=\"note\">before {}</p><p>after "
        "{}</p><br>",
        text(after[i], "prompt"),
        text(after[i], "expected"),
        text(before[i], "text"),
        text(after[i], "text"));
  }
  return out.empty() ? out : "<section><h2>Samples, greedy</h2>" + out + "</section>";
}

// A whole text has no prompt but its first token: some of it is given, or all would be answered alike.
Question sample_of(const Example& example) {
  auto question = question_of(example);
  auto& expected = question.expected;
  if (question.prompt.size() == 1 && std::ssize(expected) > 2 * kOpening) {
    const auto end = expected.begin() + kOpening;
    question.prompt.insert(question.prompt.end(), expected.begin(), end);
    expected.erase(expected.begin(), end);
    expected.resize(std::min(expected.size(), static_cast<size_t>(kNewTokens)));
  }
  return question;
}

}  // namespace

json write_samples(const Pretrained& loaded, const TrainingData& data, int64_t count) {
  auto samples = json::array();
  auto model = loaded.model;
  const bool was_training = model->is_training();
  model->eval();
  for (int64_t i = 0; i < std::min(count, data.size()); ++i) {
    const auto question = sample_of(data.example(i));
    const auto length = static_cast<int64_t>(question.prompt.size());
    const auto engine = gemma_torch::make_engine(
        model, {.kind = EngineKind::kEager, .capacity = length + kNewTokens});
    const auto written = greedy_answer(*engine, question.prompt, kNewTokens, loaded);
    samples.push_back({{"prompt", prompt_text(question.prompt, loaded.tokenizer)},
                       {"expected", prompt_text(question.expected, loaded.tokenizer)},
                       {"text", prompt_text(written, loaded.tokenizer)}});
  }
  model->train(was_training);
  return samples;
}

std::string finetune_page(const FinetunePage& page) {
  std::string body = "<main>";
  body += chart_html("Loss", "nats a target", curve_of(page.log, "loss"));
  body += chart_html("Loss on held-out data", "nats a target", curve_of(page.log, "eval_loss"));
  body += chart_html("Learning rate", "", curve_of(page.log, "learning_rate"));
  body += chart_html("Gradient norm", "before it is clipped", curve_of(page.log, "grad_norm"));
  body += "</main>" + samples_html(page.before, page.after);
  return html_page(page.title, body);
}

}  // namespace gemma_torch::apps
