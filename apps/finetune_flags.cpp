#include "finetune_flags.h"

#include "gemma_torch/base/error.h"

namespace gemma_torch::apps {
namespace {

void add_training_flags(CLI::App& command, FinetuneFlags& flags) {
  const auto number = [&](const char* name, auto& target, const char* help) {
    command.add_option(name, target, help)->capture_default_str();
  };
  command.add_option(
      "--learning-rate", flags.learning_rate, "[2e-4; of weights 2e-5; from scratch 1e-3]");
  number("--schedule", flags.schedule, "of the learning rate: constant, linear or cosine");
  number("--warmup", flags.trainer.warmup, "steps in which the learning rate rises from 0");
  number("--weight-decay", flags.trainer.adamw.weight_decay, "of AdamW; norms have none");
  number("--optimizer-dtype",
         flags.optimizer_dtype,
         "of moments and of bfloat16 weights' master copies: float32, or bfloat16: no masters, all "
         "rounded by chance, less memory and time");
  number("--max-grad-norm", flags.trainer.max_grad_norm, "longer gradients are shortened; 0: none");
  number("--epochs", flags.epochs, "passes over the data");
  number("--max-steps", flags.max_steps, "optimiser steps instead of epochs; 0: epochs");
  number("--batch-size", flags.batches.rows, "rows of a batch");
  number("--accumulate", flags.trainer.accumulate, "batches of one optimiser step");
  number("--max-tokens", flags.examples.max_tokens, "of an example; what is longer loses its end");
  command.add_flag("--pack", flags.batches.pack, "several examples a row, none seeing another");
  command.add_flag("--all-tokens", flags.examples.all_tokens, "loss on prompts too");
  command.add_flag("--in-order", flags.in_order, "as the file has the examples, not shuffled");
  command.add_flag(
      "--recompute",
      flags.pass.recompute,
      "run each block again for its gradients: less memory, a third more work in them");
  command.add_flag(
      "--written-out", flags.pass.written_out, "the modules' own forward on the CPU too");
  command.add_option(
      "--seed", flags.seed, "of shuffling, dropout and the first matrices [random, printed]");
}

void add_lora_flags(CLI::App& command, FinetuneFlags& flags) {
  command.add_option("--lora-rank", flags.lora.rank, "of the adapter")->capture_default_str();
  command.add_option(
      "--lora-alpha", flags.alpha, "what it adds is scaled by alpha / rank [2 rank]");
  command.add_option("--lora-dropout", flags.lora.dropout, "share of inputs")
      ->capture_default_str();
  command.add_flag("--rslora", flags.lora.use_rslora, "scaled by alpha / sqrt(rank)");
  command.add_option("--target-modules", flags.lora.target_modules, "projections it adapts")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->capture_default_str();
  command.add_option("--from", flags.from, "an adapter in PEFT's files to begin with");
  command.add_flag("--full", flags.full, "train all weights instead of an adapter");
  command
      .add_option("--train",
                  flags.train,
                  "train these weights instead: names or globs, '*.mlp.*,*norm.weight'")
      ->delimiter(',')
      ->allow_extra_args(false);
  command.add_flag("--sparse-embedding",
                   flags.sparse_embedding,
                   "of the embedding train only rows of tokens in --data: less memory; the others "
                   "stay as they are, where AdamW on all would move and decay them too");
  command.add_option("--from-scratch",
                     flags.from_scratch,
                     "a config.json: train a new model of that shape, drawn from --seed");
  command.add_option("--tokenizer",
                     flags.tokenizer,
                     "of the new model: a folder, tokenizer.model or tokenizer.json");
}

void check_new_model(const FinetuneFlags& flags) {
  const bool is_new = !flags.from_scratch.empty();
  check(is_new || flags.tokenizer.empty(),
        "[finetune] --tokenizer is that of a new model: expected --from-scratch with it");
  check(!is_new || (flags.model.model.empty() && flags.train.empty() && flags.model.lora.empty()),
        "[finetune] --from-scratch trains all of a new model: expected no --model, --lora or "
        "--train beside it");
  check(flags.optimizer_dtype == "float32" || flags.trains_weights(),
        "[finetune] --optimizer-dtype {}: expected --full, --train or --from-scratch with it, an "
        "adapter's matrices are float32",
        flags.optimizer_dtype);
  check(!flags.sparse_embedding || flags.trains_weights(),
        "[finetune] --sparse-embedding: expected --full, --train or --from-scratch with it, an "
        "adapter trains no embedding");
}

}  // namespace

void add_finetune_flags(CLI::App& command, FinetuneFlags& flags) {
  command.add_option("--data", flags.data, "JSON lines of examples, see below");
  command.add_option("--eval-data", flags.eval_data, "the same, held out: the best step is kept");
  command.add_option(
      "-o,--out", flags.run.out, "the run's folder: adapter or model, log, checkpoints");
  command.add_flag("--plain-text",
                   flags.plain_text,
                   "--data and --eval-data are whole texts, cut into windows of --max-tokens");
  add_lora_flags(command, flags);
  add_training_flags(command, flags);
  command.add_option("--eval-every", flags.run.eval_every, "steps; 0: before and after")
      ->capture_default_str();
  command.add_option("--save-every", flags.run.save_every, "steps; 0: at the end")
      ->capture_default_str();
  command
      .add_option(
          "--patience", flags.run.patience, "evaluations without a better one; 0: any number")
      ->capture_default_str();
  command.add_flag("--resume", flags.run.resume, "go on after the last checkpoint in --out");
  command
      .add_option("--samples", flags.samples, "examples answered before and after, for the page")
      ->capture_default_str();
  add_module_flags(command, flags.model);
  command.add_flag("--json", flags.json, "one JSON object on standard output");
  command.footer(
      "A line is {\"prompt\": \"..\", \"completion\": \"..\"}, {\"messages\": [{\"role\": "
      "\"user\", "
      "\"content\": \"..\"}, ..]},\n"
      "{\"text\": \"..\"}, or without a tokenizer {\"prompt_ids\": [..], \"completion_ids\": [..]} "
      "or "
      "{\"ids\": [..]}.\n"
      "Loss is on completions and the assistant's turns, or on whole texts.");
}

void check_usage(const FinetuneFlags& flags) {
  if (flags.data.empty() || flags.run.out.empty()) {
    throw CLI::RequiredError(flags.data.empty() ? "--data" : "--out");
  }
  check_new_model(flags);
  check(!(flags.full && !flags.train.empty()),
        "[finetune] --full trains all there is: expected no --train beside it");
  check(!flags.trains_weights() || flags.from.empty(),
        "[finetune] --from continues an adapter: expected no --full and no --train beside it");
  const std::pair<const char*, int64_t> ones[] = {{"--epochs", flags.epochs},
                                                  {"--batch-size", flags.batches.rows},
                                                  {"--accumulate", flags.trainer.accumulate}};
  for (const auto& [name, count] : ones) {
    check(count >= 1, "[finetune] {}: expected at least 1, got {}", name, count);
  }
  check(
      flags.max_steps >= 0, "[finetune] --max-steps: expected at least 1, got {}", flags.max_steps);
  const std::pair<const char*, int64_t> counts[] = {{"--eval-every", flags.run.eval_every},
                                                    {"--save-every", flags.run.save_every},
                                                    {"--patience", flags.run.patience},
                                                    {"--samples", flags.samples}};
  for (const auto& [name, count] : counts) {
    check(count >= 0, "[finetune] {}: expected at least 0, got {}", name, count);
  }
  check(flags.run.patience == 0 || !flags.eval_data.empty(),
        "[finetune] --patience counts evaluations: expected --eval-data with it");
}

}  // namespace gemma_torch::apps
