#pragma once

#include <CLI/CLI.hpp>
#include <optional>
#include <random>

#include "gemma_torch/engine/sampling.h"

namespace gemma_torch::apps {

/// Flags of sampling; one that is absent takes the model's own default.
struct SamplingFlags {
  bool greedy = false;
  std::optional<double> temperature, top_p, min_p, repetition_penalty;
  std::optional<int64_t> top_k;
  std::optional<uint64_t> seed;

  Sampling resolve(Sampling defaults) const {
    Sampling result{.temperature = greedy ? 0.0 : temperature.value_or(defaults.temperature),
                    .top_k = top_k.value_or(defaults.top_k),
                    .top_p = top_p.value_or(defaults.top_p),
                    .min_p = min_p.value_or(defaults.min_p),
                    .repetition_penalty = repetition_penalty.value_or(defaults.repetition_penalty),
                    .seed = seed ? *seed : std::random_device{}()};
    check_sampling(result);
    return result;
  }
};

inline void add_sampling_flags(CLI::App& command, SamplingFlags& flags) {
  command.add_flag("--greedy", flags.greedy, "always the most likely token");
  command.add_option("--temperature", flags.temperature, "[generation_config's, else 1.0]");
  command.add_option(
      "--top-k", flags.top_k, "the k most likely, 0: all [generation_config's, else 64]");
  command.add_option(
      "--top-p", flags.top_p, "the fewest that reach p together [generation_config's, else 0.95]");
  command.add_option("--min-p", flags.min_p, "those at least p times as likely as the first [0]");
  command.add_option(
      "--repetition-penalty", flags.repetition_penalty, "divides the logits of tokens seen [1]");
  command.add_option("--seed", flags.seed, "[random, printed]");
}

}  // namespace gemma_torch::apps
