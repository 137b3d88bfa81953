#include "generation.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <optional>

#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/generate/generate.h"
#include "gemma_torch/text/stop_strings.h"
#include "gemma_torch/text/stream_decoder.h"

namespace gemma_torch::apps {
namespace {

// Turns ids into text, ends at a stop string, and shows what is certain.
struct Printer {
  StreamDecoder decoder;
  StopStrings stops;
  bool show;
  std::string text = {};

  void push(int64_t id) { add(stops.push(decoder.push(id))); }

  // The ids have ended: what was held back is certain now.
  void flush() {
    if (!stops.stopped()) {
      add(stops.push(decoder.flush()));
      add(stops.flush());
    }
  }

  void add(const std::string& safe) {
    text += safe;
    if (show) {
      print_text(safe);
    }
  }
};

void report(const GenerateResult& result,
            const Generation& row,
            const std::string& finish,
            uint64_t seed) {
  const auto rate = [](int64_t count, double seconds) {
    return seconds > 0 ? static_cast<double>(count) / seconds : 0.0;
  };
  fmt::print(stderr,
             "\n{} prompt tokens, {:.1f} tok/s; {} new, {:.1f} tok/s; first after {:.0f} ms; {}; "
             "seed {}\n",
             result.prompt_tokens,
             rate(result.prompt_tokens, result.prefill_seconds),
             row.ids.size(),
             rate(result.decode_steps, result.decode_seconds),
             result.first_token_seconds * 1e3,
             finish,
             seed);
}

nlohmann::json to_json(const std::vector<int64_t>& prompt,
                       const GenerateResult& result,
                       const Pretrained& loaded) {
  const auto rate = [](int64_t count, double seconds) {
    return count > 0 && seconds > 0 ? nlohmann::json(static_cast<double>(count) / seconds)
                                    : nlohmann::json();
  };
  return {{"prompt_ids", prompt},
          {"ids", result.rows[0].ids},
          {"time_to_first_token_ms", result.first_token_seconds * 1e3},
          {"prefill_tokens_per_second", rate(result.prompt_tokens, result.prefill_seconds)},
          {"decode_tokens_per_second", rate(result.decode_steps, result.decode_seconds)},
          {"peak_memory_bytes", peak_memory_bytes()},
          {"device", loaded.model->tok_emb->weight.device().str()},
          {"dtype", dtype_name(loaded.config.dtype)}};
}

// None where ids have no text.
std::optional<Printer> printer_of(const Pretrained& loaded, const GenerationFlags& flags) {
  check(loaded.tokenizer || flags.stops.empty(),
        "[generate] --stop needs a tokenizer, this model has none");
  if (!loaded.tokenizer) {
    return {};
  }
  return Printer{StreamDecoder(*loaded.tokenizer, /*skip_special=*/true),
                 StopStrings(flags.stops),
                 !flags.json};
}

nlohmann::json engine_json(const Engine& engine) {
  const auto how = engine.report(0);
  return {{"engine", how.engine}, {"isa", how.isa}, {"quant", how.quant()}};
}

// How the text ended, a stop string told from a callback.
std::string finish_of(const Generation& row, const std::optional<Printer>& printer) {
  const bool by_string = printer && printer->stops.stopped() && row.finish != FinishReason::kStop;
  return by_string ? "stop_string" : finish_name(row.finish);
}

GenerateOptions options_of(const Pretrained& loaded, const GenerationFlags& flags) {
  GenerateOptions options{.max_new_tokens = flags.max_new_tokens,
                          .sampling = flags.sampling.resolve(loaded.sampling),
                          .stop_ids = loaded.stop_ids};
  check(options.max_new_tokens >= 1,
        "[generate] --max-new-tokens: expected at least 1, got {}",
        options.max_new_tokens);
  return options;
}

}  // namespace

void add_generation_flags(CLI::App& command, GenerationFlags& flags) {
  add_text_flags(command, flags.text);
  command.add_option("-n,--max-new-tokens", flags.max_new_tokens, "new tokens at most")
      ->capture_default_str();
  add_sampling_flags(command, flags.sampling);
  command
      .add_option(
          "--stop", flags.stops, "text that ends the generation and is not shown; may be repeated")
      ->allow_extra_args(false);
  command.add_flag("--json", flags.json, "one JSON object on standard output");
}

EngineMaker probed_engine(const Pretrained& loaded, Probe probe) {
  return [model = loaded.model, probe = std::move(probe)](int64_t needed) {
    return gemma_torch::make_engine(
        model, {.kind = EngineKind::kEager, .capacity = needed, .probe = probe});
  };
}

void run_generation(const Pretrained& loaded,
                    const GenerationFlags& flags,
                    const EngineMaker& make,
                    const nlohmann::json& more) {
  const auto prompt = read_ids(flags.text, loaded.tokenizer);
  check(!prompt.empty(), "[generate] prompt: expected at least one token, got none");
  const auto options = options_of(loaded, flags);
  const auto engine = make(static_cast<int64_t>(prompt.size()) + options.max_new_tokens);
  auto printer = printer_of(loaded, flags);
  catch_interrupt();
  const auto result = generate(*engine, {prompt}, options, [&](int64_t, int64_t id) {
    if (printer) {
      printer->push(id);
    }
    return !interrupted() && !(printer && printer->stops.stopped());
  });
  if (printer) {
    printer->flush();
  }
  const auto& row = result.rows[0];
  const auto finish = finish_of(row, printer);
  if (!flags.json) {
    print_text(printer ? "\n" : fmt::format("{}\n", fmt::join(row.ids, ",")));
    report(result, row, finish, options.sampling.seed);
    return;
  }
  auto object = to_json(prompt, result, loaded);
  object["text"] = printer ? nlohmann::json(printer->text) : nlohmann::json();
  object["finish_reason"] = finish;
  object["seed"] = options.sampling.seed;
  object.update(engine_json(*engine));
  object.update(more);
  print_json(object);
}

}  // namespace gemma_torch::apps
