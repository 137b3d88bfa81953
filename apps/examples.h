#pragma once

#include <memory>
#include <string>
#include <vector>

#include "gemma_torch/adapt/training_data.h"
#include "gemma_torch/engine/engine.h"
#include "gemma_torch/pretrained.h"

namespace gemma_torch::apps {

/// A file of examples, in the vocabulary of a model. Ctrl-C, once caught, stops its reading, in the
/// name of the command. Throws: Error as TrainingData.
std::unique_ptr<TrainingData> open_examples(const char* command,
                                            const std::string& path,
                                            const Pretrained& loaded,
                                            ExampleOptions options);

/// An example as what is given, and what should follow.
struct Question {
  std::vector<int64_t> prompt = {}, expected = {};
  std::vector<bool> is_target = {};  // of expected
  bool one_answer = true;            // expected is targets alone
};

Question question_of(const Example& example);

/// What greedy decoding makes of a prompt, on an engine that is reset before.
std::vector<int64_t> greedy_answer(Engine& engine,
                                   const std::vector<int64_t>& prompt,
                                   int64_t max_new_tokens,
                                   const Pretrained& loaded);

}  // namespace gemma_torch::apps
