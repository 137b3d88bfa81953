#include "gemma_torch/inspect/classification_report.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

double ratio(int64_t part, int64_t whole) {
  return whole > 0 ? static_cast<double>(part) / static_cast<double>(whole) : 0.0;
}

double log_sum(const std::vector<double>& logs) {
  const double largest = *std::max_element(logs.begin(), logs.end());
  double sum = 0;
  for (const auto value : logs) {
    sum += std::exp(value - largest);
  }
  return largest + std::log(sum);
}

// Row and column of one label in the confusion matrix.
LabelReport label_report(const std::vector<std::vector<int64_t>>& confusion, size_t label) {
  LabelReport report;
  for (size_t other = 0; other < confusion.size(); ++other) {
    report.support += confusion[label][other];
    report.predicted += confusion[other][label];
  }
  const auto right = confusion[label][label];
  report.precision = ratio(right, report.predicted);
  report.recall = ratio(right, report.support);
  report.f1 = ratio(2 * right, report.support + report.predicted);
  return report;
}

}  // namespace

int64_t argmax(const std::vector<double>& values) {
  return std::max_element(values.begin(), values.end()) - values.begin();
}

Estimate estimate(const std::vector<double>& values) {
  check(!values.empty(), "[estimate] values: expected at least one, got none");
  const auto n = static_cast<double>(values.size());
  Estimate result{.mean = std::accumulate(values.begin(), values.end(), 0.0) / n};
  double squares = 0;
  for (const auto value : values) {
    squares += (value - result.mean) * (value - result.mean);
  }
  if (values.size() > 1) {
    result.standard_error = std::sqrt(squares / (n - 1)) / std::sqrt(n);
  }
  return result;
}

std::vector<double> normalized(const std::vector<double>& log_likelihoods) {
  std::vector<double> shares;
  for (const auto value : log_likelihoods) {
    shares.push_back(std::exp(value - log_sum(log_likelihoods)));
  }
  return shares;
}

std::vector<double> calibrated(const std::vector<double>& log_likelihoods,
                               const std::vector<std::vector<double>>& content_free) {
  check(!content_free.empty(), "[calibrated] content-free texts: expected at least one, got none");
  std::vector<double> quotients;
  for (size_t label = 0; label < log_likelihoods.size(); ++label) {
    std::vector<double> logs;  // of the label's probability after each content-free text
    for (const auto& other : content_free) {
      check(other.size() == log_likelihoods.size(),
            "[calibrated] content-free log-likelihoods: expected {}, got {}",
            log_likelihoods.size(),
            other.size());
      logs.push_back(other[label] - log_sum(other));
    }
    quotients.push_back(log_likelihoods[label] - log_sum(logs));  // a common factor: no matter
  }
  return normalized(quotients);
}

ClassificationReport classification_report(const std::vector<int64_t>& truth,
                                           const std::vector<int64_t>& predicted,
                                           int64_t labels) {
  check(!truth.empty() && truth.size() == predicted.size(),
        "[classification_report] items: expected as many labels as predictions, got {} and {}",
        truth.size(),
        predicted.size());
  const auto size = static_cast<size_t>(labels);
  ClassificationReport report;
  report.confusion.assign(size, std::vector<int64_t>(size, 0));
  std::vector<double> right;
  for (size_t i = 0; i < truth.size(); ++i) {
    check(std::min(truth[i], predicted[i]) >= 0 && std::max(truth[i], predicted[i]) < labels,
          "[classification_report] item {}: expected labels from 0 to {}, got {} and {}",
          i,
          labels - 1,
          truth[i],
          predicted[i]);
    ++report.confusion[static_cast<size_t>(truth[i])][static_cast<size_t>(predicted[i])];
    right.push_back(truth[i] == predicted[i] ? 1 : 0);
  }
  report.accuracy = estimate(right);
  double sum = 0;
  int64_t seen = 0;
  for (size_t label = 0; label < size; ++label) {
    report.labels.push_back(label_report(report.confusion, label));
    const auto& found = report.labels.back();
    sum += found.f1;
    seen += found.support + found.predicted > 0 ? 1 : 0;
  }
  report.macro_f1 = sum / static_cast<double>(seen);
  return report;
}

}  // namespace gemma_torch
