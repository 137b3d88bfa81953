#include "examples.h"

#include <algorithm>

#include "common.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/generate/generate.h"

namespace gemma_torch::apps {

std::unique_ptr<TrainingData> open_examples(const char* command,
                                            const std::string& path,
                                            const Pretrained& loaded,
                                            ExampleOptions options) {
  Progress progress(path + ": MB read");
  options.vocab_size = loaded.config.vocab_size;
  const auto* tokenizer = loaded.tokenizer ? &*loaded.tokenizer : nullptr;
  return std::make_unique<TrainingData>(path, tokenizer, options, [&](int64_t done, int64_t total) {
    progress.show(done >> 20, total >> 20);
    check(!interrupted(), "[{}] stopped while {} was read; nothing was written", command, path);
  });
}

Question question_of(const Example& example) {
  const auto first = std::find(example.is_target.begin(), example.is_target.end(), true);
  const auto length = first - example.is_target.begin();
  Question question;
  question.prompt.assign(example.ids.begin(), example.ids.begin() + length);
  question.expected.assign(example.ids.begin() + length, example.ids.end());
  question.is_target.assign(first, example.is_target.end());
  question.one_answer = std::find(first, example.is_target.end(), false) == example.is_target.end();
  return question;
}

std::vector<int64_t> greedy_answer(Engine& engine,
                                   const std::vector<int64_t>& prompt,
                                   int64_t max_new_tokens,
                                   const Pretrained& loaded) {
  engine.reset();
  return generate(engine,
                  {prompt},
                  {.max_new_tokens = max_new_tokens,
                   .sampling = {.temperature = 0},
                   .stop_ids = loaded.stop_ids})
      .rows[0]
      .ids;
}

}  // namespace gemma_torch::apps
