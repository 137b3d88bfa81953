#include "score_report.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "gemma_torch/inspect/classification_report.h"

namespace gemma_torch::apps {
namespace {

using nlohmann::json;

json error_json(const Estimate& estimate) {
  return estimate.standard_error ? json(*estimate.standard_error) : json();
}

// Adds NAME and NAME_stderr: how often `key` of a row is its answer. Null where a row has no such
// prediction, or none an answer.
void add_accuracy(json& summary,
                  const std::string& name,
                  const std::vector<json>& rows,
                  const char* key) {
  std::vector<double> right;
  bool known = true;
  for (const auto& row : rows) {
    if (!row["answer"].is_null()) {
      known &= !row[key].is_null();
      right.push_back(row[key] == row["answer"] ? 1 : 0);
    }
  }
  known &= !right.empty();
  const auto found = known ? estimate(right) : Estimate{};
  summary[name] = known ? json(found.mean) : json();
  summary[name + "_stderr"] = error_json(found);
}

// What both tasks say of their items.
json counts(const std::vector<json>& rows) {
  int64_t answered = 0, truncated = 0, dropped = 0;
  for (const auto& row : rows) {
    answered += row["answer"].is_null() ? 0 : 1;
    truncated += row["dropped_tokens"] > 0 ? 1 : 0;
    dropped += row["dropped_tokens"].get<int64_t>();
  }
  return {{"n", rows.size()},
          {"answered", answered},
          {"truncated", truncated},
          {"dropped_tokens", dropped}};
}

json classification_json(const std::vector<json>& rows,
                         const char* key,
                         const std::vector<std::string>& labels) {
  std::vector<int64_t> truth, predicted;
  for (const auto& row : rows) {
    if (!row["answer"].is_null()) {
      truth.push_back(row["answer"].get<int64_t>());
      predicted.push_back(row[key].get<int64_t>());
    }
  }
  if (truth.empty()) {
    return {};
  }
  const auto report = classification_report(truth, predicted, static_cast<int64_t>(labels.size()));
  auto by_label = json::array();
  for (size_t i = 0; i < labels.size(); ++i) {
    const auto& found = report.labels[i];
    by_label.push_back({{"label", labels[i]},
                        {"support", found.support},
                        {"predicted", found.predicted},
                        {"precision", found.precision},
                        {"recall", found.recall},
                        {"f1", found.f1}});
  }
  return {{"accuracy", report.accuracy.mean},
          {"accuracy_stderr", error_json(report.accuracy)},
          {"macro_f1", report.macro_f1},
          {"confusion", report.confusion},
          {"labels", by_label}};
}

std::string number(const json& value) {
  return value.is_null() ? "-" : fmt::format("{:.4f}", value.get<double>());
}

std::string counts_text(const json& summary, const char* what) {
  auto text = fmt::format("{} {}, {} with an answer",
                          summary["n"].get<int64_t>(),
                          what,
                          summary["answered"].get<int64_t>());
  if (summary["truncated"] > 0) {
    text += fmt::format("; {} of them cut: {} tokens left out",
                        summary["truncated"].get<int64_t>(),
                        summary["dropped_tokens"].get<int64_t>());
  }
  return text + "\n";
}

std::string confusion_text(const json& report) {
  std::string text = fmt::format("  {:<16}", "is \\ was given");
  for (const auto& row : report["labels"]) {
    text += fmt::format(" {:>8}", row["label"].get<std::string>());
  }
  text += "  precision   recall       F1\n";
  for (size_t i = 0; i < report["labels"].size(); ++i) {
    const auto& row = report["labels"][i];
    text += fmt::format("  {:<16}", row["label"].get<std::string>());
    for (const auto& count : report["confusion"][i]) {
      text += fmt::format(" {:>8}", count.get<int64_t>());
    }
    text += fmt::format("   {:>8} {:>8} {:>8}\n",
                        number(row["precision"]),
                        number(row["recall"]),
                        number(row["f1"]));
  }
  return text;
}

}  // namespace

json item_json(const ScoreItem& item, const std::vector<ContinuationScore>& scores) {
  json row = {{"answer", item.answer ? json(*item.answer) : json()},
              {"context_tokens", item.context.size()},
              {"dropped_tokens", item.dropped},
              {"ids", item.continuations}};
  for (const auto& score : scores) {
    row["logprob"].push_back(score.total());
    row["logprobs"].push_back(score.log_probs);
    row["is_greedy"].push_back(score.is_greedy);
  }
  return row;
}

json choice_json(const ScoreItem& item, const std::vector<ContinuationScore>& scores) {
  auto row = item_json(item, scores);
  auto values = row["logprob"].get<std::vector<double>>();
  row["predicted"] = argmax(values);
  row["predicted_norm"] = nullptr;
  if (!item.characters.empty()) {
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] /= static_cast<double>(item.characters[i]);
    }
    row["predicted_norm"] = argmax(values);
  }
  return row;
}

json label_json(const ScoreItem& item,
                const std::vector<ContinuationScore>& scores,
                const std::vector<json>& content_free) {
  auto row = item_json(item, scores);
  const auto values = row["logprob"].get<std::vector<double>>();
  row["probabilities"] = normalized(values);
  row["predicted"] = argmax(values);
  if (!content_free.empty()) {
    std::vector<std::vector<double>> others;
    for (const auto& other : content_free) {
      others.push_back(other["logprob"].get<std::vector<double>>());
    }
    const auto found = calibrated(values, others);
    row["calibrated"] = found;
    row["predicted_calibrated"] = argmax(found);
  }
  return row;
}

json choices_summary(const std::vector<json>& rows) {
  auto summary = counts(rows);
  add_accuracy(summary, "acc", rows, "predicted");
  add_accuracy(summary, "acc_norm", rows, "predicted_norm");
  return summary;
}

std::string choices_text(const json& summary) {
  auto text = counts_text(summary, "items");
  for (const std::string name : {"acc", "acc_norm"}) {
    text += fmt::format(
        "{:<8} {} +- {}\n", name, number(summary[name]), number(summary[name + "_stderr"]));
  }
  return text;
}

json labels_summary(const std::vector<json>& rows, const std::vector<std::string>& labels) {
  auto summary = counts(rows);
  summary["labels"] = labels;
  summary["plain"] = classification_json(rows, "predicted", labels);
  summary["calibrated"] = classification_json(rows, "predicted_calibrated", labels);
  return summary;
}

std::string labels_text(const json& summary) {
  auto text = counts_text(summary, "texts");
  const auto names = summary["labels"].get<std::vector<std::string>>();
  for (const auto& row : summary["content_free"]) {
    text += fmt::format("after {}:", row["text"].dump());
    for (size_t i = 0; i < names.size(); ++i) {
      text += fmt::format(" {} {:.4f}", names[i], row["probabilities"][i].get<double>());
    }
    text += "\n";
  }
  for (const char* name : {"plain", "calibrated"}) {
    const auto& report = summary[name];
    if (!report.is_null()) {
      text += fmt::format("{}: accuracy {} +- {}, macro F1 {}\n",
                          name,
                          number(report["accuracy"]),
                          number(report["accuracy_stderr"]),
                          number(report["macro_f1"])) +
              confusion_text(report);
    }
  }
  return text;
}

std::string continuations_text(const json& value) {
  std::vector<json> rows = value["continuations"];
  std::stable_sort(rows.begin(), rows.end(), [](const json& a, const json& b) {
    return a["logprob"].get<double>() > b["logprob"].get<double>();
  });
  std::string text =
      fmt::format("{:>10} {:>6}  {:<6}  token by token\n", "logprob", "tokens", "greedy");
  for (const auto& row : rows) {
    text += fmt::format("{:>10.4f} {:>6}  {:<6} ",
                        row["logprob"].get<double>(),
                        row["ids"].size(),
                        row["is_greedy"].get<bool>() ? "yes" : "no");
    for (size_t i = 0; i < row["ids"].size(); ++i) {
      text += fmt::format(
          " {} {:.4f}", row["labels"][i].get<std::string>(), row["logprobs"][i].get<double>());
    }
    text += "\n";
  }
  return text;
}

}  // namespace gemma_torch::apps
