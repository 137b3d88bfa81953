#include <fmt/format.h>

#include "common.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/engine/traced.h"

namespace gemma_torch::apps {
namespace {

struct TraceFlags {
  ModelOptions model = {};
  std::string out;
  int64_t batch = 1;
  bool freeze = false;
};

void run_trace(const TraceFlags& flags) {
  check(flags.batch >= 1, "[trace] --batch: expected at least 1, got {}", flags.batch);
  check(flags.model.ctx >= 1, "[ctx] expected at least 1, got {}", flags.model.ctx);
  auto options = flags.model;
  options.engine = "traced";
  const auto loaded = load(options);
  const auto how = engine_options(loaded, options, options.ctx, flags.batch);
  fmt::print(stderr,
             "gemma: tracing {} for {} row{} of {} tokens to {}\n",
             model_path(options.model),
             flags.batch,
             flags.batch == 1 ? "" : "s",
             options.ctx,
             flags.out);
  save_trace(loaded.model, how, flags.freeze, config_to_json(loaded.config).dump(2), flags.out);
}

}  // namespace

void add_trace(CLI::App& app) {
  auto* command = app.add_subcommand(
      "trace",
      "a TorchScript file of the model with its cache, for --traced-file and torch.jit.load");
  auto flags = std::make_shared<TraceFlags>();
  auto& model = flags->model;
  model.ctx = 4096;
  add_model_flag(*command, model.model);
  command->add_option("-o,--out", flags->out, "the file to make")->required();
  command->add_option("--device", model.device, "auto, cpu, cuda or mps")->capture_default_str();
  command->add_option("--dtype", model.dtype, "auto (the checkpoint's), float32 or bfloat16")
      ->capture_default_str();
  command
      ->add_option(
          "--kv", model.kv, "dtype of keys and values: auto (the weights'), float32 or bfloat16")
      ->capture_default_str();
  command->add_option("--ctx", model.ctx, "tokens a row may hold")->capture_default_str();
  command->add_option("--batch", flags->batch, "rows that advance together")->capture_default_str();
  command->add_flag("--freeze", flags->freeze, "weights become constants of the graph");
  command->callback([flags] { run_trace(*flags); });
}

}  // namespace gemma_torch::apps
