#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common.h"
#include "gemma_torch/model/probe.h"
#include "sampling_flags.h"

namespace gemma_torch::apps {

/// What a command that continues a text takes beside its model.
struct GenerationFlags {
  TextOptions text = {};
  SamplingFlags sampling = {};
  int64_t max_new_tokens = 64;
  std::vector<std::string> stops = {};
  bool json = false;
};

void add_generation_flags(CLI::App& command, GenerationFlags& flags);

/// Makes an engine that holds so many tokens a row.
using EngineMaker = std::function<std::unique_ptr<Engine>(int64_t needed)>;

/// Continues the text, prints it as it comes and a line of statistics on standard error, or with
/// --json one object, to which the fields of `more` are added. Ctrl-C ends the text.
/// Throws: Error for an empty prompt, a bad flag, or --stop without a tokenizer; before any token.
void run_generation(const Pretrained& loaded,
                    const GenerationFlags& flags,
                    const EngineMaker& make,
                    const nlohmann::json& more = nlohmann::json::object());

/// Makes eager engines that run under `probe`.
EngineMaker probed_engine(const Pretrained& loaded, Probe probe);

}  // namespace gemma_torch::apps
