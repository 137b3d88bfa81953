#include <fmt/format.h>

#include "common.h"

namespace gemma_torch::apps {
namespace {

struct ConvertFlags {
  std::string source;
  std::string out;
};

void run_convert(const ConvertFlags& flags) {
  fmt::print(stderr, "gemma: converting {} to {}\n", flags.source, flags.out);
  convert_to_folder(flags.source, flags.out);
}

}  // namespace

void add_convert(CLI::App& app) {
  auto* command = app.add_subcommand("convert", "a .gguf file or HF folder to an HF folder");
  auto flags = std::make_shared<ConvertFlags>();
  command->add_option("source,-m,--model", flags->source, "HF folder or .gguf file")->required();
  command->add_option("-o,--out", flags->out, "the folder to make; new or empty")->required();
  command->callback([flags] { run_convert(*flags); });
}

}  // namespace gemma_torch::apps
