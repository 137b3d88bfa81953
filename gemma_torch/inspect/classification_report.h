#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace gemma_torch {

/// The index of the largest value, the first of equals.
int64_t argmax(const std::vector<double>& values);

/// A mean and how far off it may be.
struct Estimate {
  double mean = 0;
  std::optional<double> standard_error = {};  // nothing for fewer than two values
};

/// Mean; standard error as lm-evaluation-harness has it: the sample's standard deviation
/// (n - 1 below the line) over the square root of n. Throws: Error if there are no values.
Estimate estimate(const std::vector<double>& values);

/// Log-likelihoods of a set of labels to probabilities that sum to 1 (a softmax).
std::vector<double> normalized(const std::vector<double>& log_likelihoods);

/// Contextual calibration (Zhao et al. 2021, "Calibrate Before Use"): W p with W = diag(p_cf)^-1,
/// where p are the labels' probabilities after a text, and p_cf those after a text without content,
/// each summing to 1; p_cf is the mean over such texts where there are several. Divided by its sum
/// here, where the paper takes a softmax: the order is the same.
/// Throws: Error if there are no content-free log-likelihoods, or the sizes differ.
std::vector<double> calibrated(const std::vector<double>& log_likelihoods,
                               const std::vector<std::vector<double>>& content_free);

/// How one label was found.
struct LabelReport {
  int64_t support = 0;    // items that have it
  int64_t predicted = 0;  // items that were given it
  double precision = 0;   // 0 where it was never given
  double recall = 0;      // 0 where no item has it
  double f1 = 0;
};

struct ClassificationReport {
  std::vector<std::vector<int64_t>> confusion = {};  // (label of the item, label given)
  std::vector<LabelReport> labels = {};
  Estimate accuracy = {};
  double macro_f1 = 0;  // mean of f1 over the labels that items have or were given
};

/// As scikit-learn's confusion_matrix, precision_recall_fscore_support and f1_score(average="macro")
/// with zero_division=0. Labels are 0 to `labels` - 1.
/// Throws: Error if the lists are empty or differ in length, or hold another label.
ClassificationReport classification_report(const std::vector<int64_t>& truth,
                                           const std::vector<int64_t>& predicted,
                                           int64_t labels);

}  // namespace gemma_torch
