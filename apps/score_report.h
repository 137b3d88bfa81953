#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gemma_torch/inspect/score.h"
#include "score_tasks.h"

namespace gemma_torch::apps {

/// One item's result: answer, logprob (a sum each), is_greedy, context_tokens, dropped_tokens, and
/// token by token ids and logprobs.
nlohmann::json item_json(const ScoreItem& item, const std::vector<ContinuationScore>& scores);

/// The same with predicted and predicted_norm: the likeliest choice, and the likeliest for its
/// length in characters (null where choices were given as ids).
nlohmann::json choice_json(const ScoreItem& item, const std::vector<ContinuationScore>& scores);

/// The same with probabilities of the labels, predicted, and both calibrated by the rows of the
/// content-free texts; before those are known, without the latter.
nlohmann::json label_json(const ScoreItem& item,
                          const std::vector<ContinuationScore>& scores,
                          const std::vector<nlohmann::json>& content_free);

/// acc, acc_norm and their stderr as lm-evaluation-harness has them, over the rows with an answer.
nlohmann::json choices_summary(const std::vector<nlohmann::json>& rows);
std::string choices_text(const nlohmann::json& summary);

/// Of the rows with an answer, plain and calibrated: accuracy, macro F1, confusion matrix, and
/// precision, recall and F1 of each label.
nlohmann::json labels_summary(const std::vector<nlohmann::json>& rows,
                              const std::vector<std::string>& labels);
std::string labels_text(const nlohmann::json& summary);

/// Continuations of one prompt, likeliest first as text.
std::string continuations_text(const nlohmann::json& value);

}  // namespace gemma_torch::apps
