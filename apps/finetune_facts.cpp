#include "finetune_facts.h"

#include "fingerprint.h"
#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "launch.h"

namespace gemma_torch::apps {

using nlohmann::json;

json facts_of(const FinetuneFlags& flags, const Pretrained& loaded, const TrainingData& data) {
  json facts = {{"model", fingerprint(loaded.model)},
                {"dtype", dtype_name(loaded.config.dtype)},
                {"data", data.fingerprint()},
                {"data_examples", data.size()},
                {"data_tokens", data.tokens()},
                {"data_targets", data.targets()},
                {"max_tokens", flags.examples.max_tokens},
                {"all_tokens", flags.examples.all_tokens},
                {"batch_size", flags.batches.rows},
                {"accumulate", flags.trainer.accumulate},
                {"ranks", flags.batches.ranks},
                {"pack", flags.batches.pack},
                {"shuffle", flags.batches.shuffle},
                {"steps", flags.trainer.steps},
                {"learning_rate", flags.trainer.learning_rate},
                {"schedule", flags.schedule},
                {"warmup", flags.trainer.warmup},
                {"weight_decay", flags.trainer.adamw.weight_decay},
                {"max_grad_norm", flags.trainer.max_grad_norm},
                {"seed", *flags.seed}};
  if (flags.trains_weights()) {
    facts["train"] = flags.train;
    facts["sparse_embedding"] = flags.sparse_embedding;
    facts["optimizer_dtype"] = dtype_name(flags.trainer.adamw.state);
  } else {
    facts["lora"] = {{"rank", flags.lora.rank},
                     {"alpha", flags.lora.alpha},
                     {"dropout", flags.lora.dropout},
                     {"use_rslora", flags.lora.use_rslora},
                     {"target_modules", flags.lora.target_modules}};
  }
  return facts;
}

void check_alike(const json& facts) {
  const auto texts = join_ranks().gather(facts.dump());
  const auto expected = json::parse(texts.front());
  for (size_t rank = 1; rank < texts.size(); ++rank) {
    const auto found = json::parse(texts[rank]);
    for (const auto& [name, value] : found.items()) {
      check(expected.value(name, json()) == value,
            "[finetune] {}: expected {}, as on rank 0, got {} on rank {}",
            name,
            expected.value(name, json()).dump(),
            value.dump(),
            rank);
    }
  }
}

}  // namespace gemma_torch::apps
