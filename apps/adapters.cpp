#include "adapters.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <filesystem>

#include "gemma_torch/adapt/peft.h"
#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"

namespace gemma_torch::apps {

void add_adapter_flag(CLI::App& command, std::vector<std::string>& adapters) {
  command
      .add_option("--lora",
                  adapters,
                  "adapter in PEFT's files, DIR or DIR=SCALE, may be repeated: attached to the "
                  "modules with --engine eager, else merged into the weights")
      ->allow_extra_args(false);
}

AdapterSpec parse_adapter(const std::string& text) {
  const auto at = text.rfind('=');
  if (at == std::string::npos || std::filesystem::exists(text)) {
    return {.folder = text};
  }
  AdapterSpec spec{.folder = text.substr(0, at)};
  const auto* end = text.data() + text.size();
  const auto read = std::from_chars(text.data() + at + 1, end, spec.scale);
  check(read.ec == std::errc() && read.ptr == end && std::isfinite(spec.scale),
        "[lora] {}: expected DIR or DIR=SCALE, got {} for the scale",
        text,
        text.substr(at + 1));
  return spec;
}

void add_adapters(Gemma3Model model, const std::vector<std::string>& adapters, bool merged) {
  for (const auto& text : adapters) {
    const auto spec = parse_adapter(text);
    auto adapter = load_adapter(model, spec.folder);
    adapter.scale(spec.scale);
    merged ? adapter.merge() : adapter.attach();
    fmt::print(stderr,
               "gemma: {}: {}{}\n",
               spec.folder,
               merged ? "merged into weights of " : "attached to the modules, in ",
               merged ? dtype_name(model->cfg.dtype) : "float32");
  }
}

}  // namespace gemma_torch::apps
