#include <fmt/format.h>

#include "adapters.h"
#include "common.h"
#include "gemma_torch/io/hf_folder.h"

namespace gemma_torch::apps {
namespace {

struct MergeFlags {
  ModelOptions model = {};
  std::string out = {};
};

void run_merge(const MergeFlags& flags) {
  if (flags.model.lora.empty()) {
    throw CLI::RequiredError("--lora");
  }
  AtomicFolder out(flags.out);
  // Adapters are merged where no engine of modules is asked for.
  const auto loaded = load(flags.model);
  write_model(model_path(flags.model.model), loaded, out);
  out.commit();
  print_text(flags.out + "\n");
}

}  // namespace

void add_merge(CLI::App& app) {
  auto* command = app.add_subcommand("merge", "a model with adapters to an HF folder of weights");
  auto flags = std::make_shared<MergeFlags>();
  add_model_flag(*command, flags->model.model);
  add_adapter_flag(*command, flags->model.lora);
  command->add_option("--dtype", flags->model.dtype, "auto (the checkpoint's), float32 or bfloat16")
      ->capture_default_str();
  command->add_option("-o,--out", flags->out, "the folder to make; new or empty")->required();
  command->footer(
      "What an adapter adds is added in float32 and rounded once, to the dtype of the weights:\n"
      "--dtype float32 keeps all of it. Several are added one after the other.");
  command->callback([flags] { run_merge(*flags); });
}

}  // namespace gemma_torch::apps
