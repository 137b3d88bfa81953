#include "generation.h"

namespace gemma_torch::apps {
namespace {

struct GenerateFlags {
  ModelOptions model = {};
  GenerationFlags generation = {};
};

void run_generate(const GenerateFlags& flags) {
  const auto loaded = load_to_run(flags.model);
  run_generation(loaded, flags.generation, [&](int64_t needed) {
    return make_engine(loaded, flags.model, needed);
  });
}

}  // namespace

void add_generate(CLI::App& app) {
  auto* command = app.add_subcommand("generate", "continue a text");
  auto flags = std::make_shared<GenerateFlags>();
  add_model_flags(*command, flags->model);
  add_generation_flags(*command, flags->generation);
  command->callback([flags] { run_generate(*flags); });
}

}  // namespace gemma_torch::apps
