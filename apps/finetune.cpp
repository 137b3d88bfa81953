#include <ATen/Context.h>
#include <fmt/format.h>
#include <malloc.h>

#include <cmath>
#include <filesystem>
#include <random>

#include "adapters.h"
#include "common.h"
#include "finetune_run.h"
#include "fingerprint.h"
#include "gemma_torch/adapt/peft.h"
#include "gemma_torch/adapt/trained_set.h"
#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"

namespace gemma_torch::apps {
namespace {

using json = nlohmann::json;

struct FinetuneFlags {
  ModelOptions model = {};
  std::string data = {}, eval_data = {};
  ExampleOptions examples = {};
  LoraConfig lora = {};
  std::optional<double> alpha = {};
  std::string from = {};  // an adapter's folder to begin with
  bool full = false;
  std::vector<std::string> train = {};  // globs of parameters
  BatchOptions batches = {};
  bool in_order = false;
  TrainerOptions trainer = {};
  std::optional<double> learning_rate = {};
  std::string schedule = "linear";
  int64_t epochs = 1;
  int64_t max_steps = 0;
  TrainingPassOptions pass = {};
  std::optional<uint64_t> seed = {};
  FinetuneSchedule run = {};
  bool json = false;

  bool trains_weights() const { return full || !train.empty(); }
};

Schedule parse_schedule(const std::string& name) {
  constexpr std::pair<const char*, Schedule> kNames[] = {{"constant", Schedule::kConstant},
                                                         {"linear", Schedule::kLinear},
                                                         {"cosine", Schedule::kCosine}};
  for (const auto& [known, schedule] : kNames) {
    if (name == known) {
      return schedule;
    }
  }
  fail("[finetune] --schedule: expected constant, linear or cosine, got {}", name);
}

std::unique_ptr<TrainingData> open_data(const std::string& path,
                                        const Pretrained& loaded,
                                        const FinetuneFlags& flags) {
  Progress progress(path + ": MB read");
  auto options = flags.examples;
  options.vocab_size = loaded.config.vocab_size;
  const auto* tokenizer = loaded.tokenizer ? &*loaded.tokenizer : nullptr;
  auto data =
      std::make_unique<TrainingData>(path, tokenizer, options, [&](int64_t done, int64_t total) {
        progress.show(done >> 20, total >> 20);
        check(!interrupted(), "[finetune] stopped while {} was read; nothing was written", path);
      });
  fmt::print(stderr,
             "gemma: {}: {} examples, {} tokens, {} of them targets; {} cut to {} tokens, {} left "
             "out without a target\n",
             path,
             data->size(),
             data->tokens(),
             data->targets(),
             data->truncated(),
             options.max_tokens,
             data->left_out());
  return data;
}

// Batches of `epochs` epochs over those of a step, the last step being as long as is left.
int64_t count_steps(const Batches& batches, const FinetuneFlags& flags) {
  if (flags.max_steps > 0) {
    return flags.max_steps;
  }
  int64_t count = 0;
  for (int64_t epoch = 0; epoch < flags.epochs; ++epoch) {
    count += batches.per_epoch(epoch);
  }
  return (count + flags.trainer.accumulate - 1) / flags.trainer.accumulate;
}

// What decides the numbers of a run, by which a resumed one is told from another.
json facts_of(const FinetuneFlags& flags, const Pretrained& loaded, const TrainingData& data) {
  json facts = {{"model", fingerprint(loaded.model)},
                {"dtype", dtype_name(loaded.config.dtype)},
                {"data_examples", data.size()},
                {"data_tokens", data.tokens()},
                {"data_targets", data.targets()},
                {"max_tokens", flags.examples.max_tokens},
                {"all_tokens", flags.examples.all_tokens},
                {"batch_size", flags.batches.rows},
                {"accumulate", flags.trainer.accumulate},
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
  } else {
    facts["lora"] = {{"rank", flags.lora.rank},
                     {"alpha", flags.lora.alpha},
                     {"dropout", flags.lora.dropout},
                     {"use_rslora", flags.lora.use_rslora},
                     {"target_modules", flags.lora.target_modules}};
  }
  return facts;
}

// Activations come and go by the megabyte: given back to the system each time, their pages would be cleared each time.
void keep_freed_memory() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  mallopt(M_TOP_PAD, 64 << 20);
#endif
}

void report(const FinetuneFlags& flags, const FinetuneSummary& done, const std::string& result) {
  const auto speed = done.seconds > 0 ? static_cast<double>(done.tokens) / done.seconds : 0;
  if (flags.json) {
    print_json({{"out", result},
                {"steps", flags.trainer.steps},
                {"loss", done.steps > 0 ? json(done.loss) : json()},
                {"best_step", done.best ? json(done.best->step) : json()},
                {"best_eval_loss", done.best ? json(done.best->loss) : json()},
                {"stopped_early", done.stopped_early},
                {"seed", *flags.seed},
                {"tokens", done.tokens},
                {"seconds", done.seconds},
                {"tokens_per_second", speed},
                {"peak_memory_bytes", peak_memory_bytes()}});
    return;
  }
  print_text(fmt::format("{}: {} steps, {} tokens, {:.0f} tok/s, peak memory {:.2f} GB\n",
                         result,
                         done.steps,
                         done.tokens,
                         speed,
                         static_cast<double>(peak_memory_bytes()) / 1e9));
}

void check_usage(const FinetuneFlags& flags) {
  if (flags.data.empty() || flags.run.out.empty()) {
    throw CLI::RequiredError(flags.data.empty() ? "--data" : "--out");
  }
  check(!(flags.full && !flags.train.empty()),
        "[finetune] --full trains all there is: expected no --train beside it");
  check(!flags.trains_weights() || flags.from.empty(),
        "[finetune] --from continues an adapter: expected no --full and no --train beside it");
  check(flags.epochs >= 1, "[finetune] --epochs: expected at least 1, got {}", flags.epochs);
  check(
      flags.max_steps >= 0, "[finetune] --max-steps: expected at least 1, got {}", flags.max_steps);
  const std::pair<const char*, int64_t> counts[] = {{"--eval-every", flags.run.eval_every},
                                                    {"--save-every", flags.run.save_every},
                                                    {"--patience", flags.run.patience}};
  for (const auto& [name, count] : counts) {
    check(count >= 0, "[finetune] {}: expected at least 0, got {}", name, count);
  }
  check(flags.run.patience == 0 || !flags.eval_data.empty(),
        "[finetune] --patience counts evaluations: expected --eval-data with it");
}

Adapter begin_adapter(FinetuneFlags& flags, Gemma3Model model) {
  if (!flags.from.empty()) {
    auto adapter = load_adapter(model, flags.from);
    flags.lora = adapter.config();
    return adapter;
  }
  flags.lora.alpha = flags.alpha.value_or(2.0 * static_cast<double>(flags.lora.rank));
  return {model, flags.lora};
}

void run_finetune(FinetuneFlags flags) {
  check_usage(flags);
  flags.trainer.schedule = parse_schedule(flags.schedule);
  flags.trainer.learning_rate = flags.learning_rate.value_or(flags.trains_weights() ? 2e-5 : 2e-4);
  flags.seed = flags.seed ? *flags.seed : std::random_device{}();
  flags.batches.seed = *flags.seed;
  flags.batches.shuffle = !flags.in_order;
  flags.batches.max_tokens = flags.examples.max_tokens;
  keep_freed_memory();
  catch_interrupt();
  const auto loaded = load_modules("finetune", flags.model);
  const auto data = open_data(flags.data, loaded, flags);
  const auto held_out =
      flags.eval_data.empty() ? nullptr : open_data(flags.eval_data, loaded, flags);
  const auto result = flags.run.out + (flags.trains_weights() ? "/model" : "/adapter");
  check(!std::filesystem::exists(result),
        "[finetune] {}: expected no such folder, the run is finished. Hint: another --out",
        result);

  torch::manual_seed(*flags.seed);
  std::optional<Adapter> adapter;
  std::vector<TrainedTensor> trained;
  if (flags.trains_weights()) {
    trained =
        train_parameters(loaded.model, flags.full ? std::vector<std::string>{"*"} : flags.train);
  } else {
    adapter.emplace(begin_adapter(flags, loaded.model));
    adapter->attach();
    trained = train_adapter(loaded.model, *adapter, /*narrow=*/true);
  }
  Batches batches(*data, flags.batches);
  flags.trainer.steps = count_steps(batches, flags);
  flags.trainer.epochs = flags.max_steps > 0 ? 0 : flags.epochs;
  std::optional<Batches> held_out_batches;
  if (held_out) {
    auto options = flags.batches;
    options.shuffle = false;
    held_out_batches.emplace(*held_out, options);
  }
  TrainingPass pass(loaded.model, flags.pass);
  Trainer trainer(loaded.model, pass, batches, trained, flags.trainer);
  flags.run.facts = facts_of(flags, loaded, *data);
  fmt::print(stderr, "gemma: {} steps, seed {}\n", flags.trainer.steps, *flags.seed);
  FinetuneRun run({loaded.model, &pass, &trainer, held_out ? &*held_out_batches : nullptr},
                  flags.run);
  const auto done = run.run();
  const auto base = model_path(flags.model.model);
  adapter ? save_adapter(*adapter, result, base) : write_model(base, loaded, result);
  report(flags, done, result);
}

void add_training_flags(CLI::App& command, FinetuneFlags& flags) {
  const auto number = [&](const char* name, auto& target, const char* help) {
    command.add_option(name, target, help)->capture_default_str();
  };
  command.add_option("--learning-rate", flags.learning_rate, "[2e-4; of weights 2e-5]");
  number("--schedule", flags.schedule, "of the learning rate: constant, linear or cosine");
  number("--warmup", flags.trainer.warmup, "steps in which the learning rate rises from 0");
  number("--weight-decay", flags.trainer.adamw.weight_decay, "of AdamW; norms have none");
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
}

}  // namespace

void add_finetune(CLI::App& app) {
  auto* command =
      app.add_subcommand("finetune", "train an adapter, or the weights, on your examples");
  auto flags = std::make_shared<FinetuneFlags>();
  command->add_option("--data", flags->data, "JSON lines of examples, see below");
  command->add_option("--eval-data", flags->eval_data, "the same, held out: the best step is kept");
  command->add_option(
      "-o,--out", flags->run.out, "the run's folder: adapter or model, log, checkpoints");
  add_lora_flags(*command, *flags);
  add_training_flags(*command, *flags);
  command->add_option("--eval-every", flags->run.eval_every, "steps; 0: before and after")
      ->capture_default_str();
  command->add_option("--save-every", flags->run.save_every, "steps; 0: at the end")
      ->capture_default_str();
  command
      ->add_option(
          "--patience", flags->run.patience, "evaluations without a better one; 0: any number")
      ->capture_default_str();
  command->add_flag("--resume", flags->run.resume, "go on after the last checkpoint in --out");
  add_module_flags(*command, flags->model);
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->footer(
      "A line is {\"prompt\": \"..\", \"completion\": \"..\"}, {\"messages\": [{\"role\": "
      "\"user\", "
      "\"content\": \"..\"}, ..]},\n"
      "{\"text\": \"..\"}, or without a tokenizer {\"prompt_ids\": [..], \"completion_ids\": [..]} "
      "or "
      "{\"ids\": [..]}.\n"
      "Loss is on completions and the assistant's turns, or on whole texts.");
  command->callback([flags] { run_finetune(*flags); });
}

}  // namespace gemma_torch::apps
