#include "gemma_torch/inspect/kl.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "common.h"
#include "fingerprint.h"
#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "part_journal.h"
#include "window_flags.h"

namespace gemma_torch::apps {
namespace {

struct KlFlags {
  ModelOptions model = {};
  TextOptions text = {};
  std::string file = {};
  int64_t chunk = 512;
  bool resume = false;
  bool json = false;
};

// Metadata that says which vocabulary the ids are of: its pieces as one number.
std::string vocabulary_hash(const Tokenizer& tokenizer) {
  Fingerprint pieces;
  for (int64_t id = 0; id < tokenizer.size(); ++id) {
    pieces.add(tokenizer.piece(id));
  }
  return pieces.hex();
}

std::function<void(int64_t, int64_t)> shown_on(Progress& progress, const char* left) {
  return [&progress, left](int64_t done, int64_t total) {
    progress.show(done, total);
    check(!interrupted(), "[kl] interrupted{}", left);
  };
}

Metadata describe(const KlFlags& flags, const Pretrained& loaded, const Engine& engine) {
  const auto report = engine.report(/*depth=*/0);
  Metadata about = {{"reference", "gemma_torch"},
                    {"model", model_path(flags.model.model)},
                    {"engine", report.engine},
                    {"dtype", dtype_name(loaded.config.dtype)},
                    {"quant", report.quant()}};
  if (loaded.tokenizer) {
    about["vocabulary"] = vocabulary_hash(*loaded.tokenizer);
  }
  return about;
}

// What a part of a file must have been made with, to be gone on with.
nlohmann::json header_json(const KlFlags& flags,
                           const Pretrained& loaded,
                           const Engine& engine,
                           const std::vector<int64_t>& ids) {
  const auto report = engine.report(/*depth=*/0);
  auto header = numbers_json(loaded);
  header.update(nlohmann::json(describe(flags, loaded, engine)));
  Fingerprint tokens;
  tokens.add(ids);
  header.update({{"format", "gemma kl save 1"},
                 {"isa", report.isa},
                 {"cached", report.cached},
                 {"kv", flags.model.kv},
                 {"products", flags.model.products},
                 {"chunk", flags.chunk},
                 {"tokens", tokens.hex()}});
  return header;
}

// Sets where to go on, and notes how far the work is.
void go_on(SaveOptions& options, PartJournal& journal) {
  const auto last = journal.last();
  options.from = last.is_null() ? SavedPart{}
                                : SavedPart{last.at("positions").get<int64_t>(),
                                            last.at("log_prob").get<double>()};
  options.on_part = [&journal](const SavedPart& part) {
    journal.append({{"positions", part.positions}, {"log_prob", part.log_prob}});
  };
}

void run_save(const KlFlags& flags) {
  const auto loaded = load_to_run(flags.model);
  const auto ids = read_ids(flags.text, loaded.tokenizer);
  const WindowOptions windows{.chunk = flags.chunk, .bos_id = bos_id(loaded.tokenizer)};
  const auto needed = window_tokens(static_cast<int64_t>(ids.size()), windows);
  const auto engine = make_engine(loaded, flags.model, needed);
  SaveOptions options{.windows = windows, .metadata = describe(flags, loaded, *engine)};
  std::optional<PartJournal> journal;
  if (flags.resume) {
    journal.emplace(flags.file, header_json(flags, loaded, *engine, ids));
    go_on(options, *journal);
  }
  catch_interrupt();
  Progress progress("tokens");
  options.windows.on_progress =
      shown_on(progress,
               flags.resume ? ". Hint: the same command goes on from there"
                            : "; nothing was written. Hint: with --resume a later run goes on");
  const auto done = save_distributions(*engine, ids, options, flags.file);
  if (journal) {
    journal->remove();
  }
  if (flags.json) {
    print_json({{"out", flags.file},
                {"tokens", ids.size()},
                {"positions", done.positions},
                {"bytes", done.bytes},
                {"nll", done.nll},
                {"perplexity", std::exp(done.nll)}});
    return;
  }
  print_text(fmt::format("{}: {} positions of {} tokens, {:.1f} MB, perplexity {:.4f}\n",
                         flags.file,
                         done.positions,
                         ids.size(),
                         static_cast<double>(done.bytes) / 1e6,
                         std::exp(done.nll)));
}

void check_vocabulary(const SavedDistributions& saved, const Pretrained& loaded) {
  check(saved.vocab_size() == loaded.config.vocab_size,
        "[kl] vocabulary: expected {} tokens, as the file has, got {}",
        saved.vocab_size(),
        loaded.config.vocab_size);
  const auto own = saved.metadata().find("vocabulary");
  check(own == saved.metadata().end() || !loaded.tokenizer ||
            own->second == vocabulary_hash(*loaded.tokenizer),
        "[kl] vocabulary: expected that of the file's model, got another one of as many tokens");
}

nlohmann::json to_json(const Estimate& estimate) {
  return {{"value", estimate.value}, {"error", estimate.error}};
}

Estimate perplexity(const Estimate& nll) {
  return {std::exp(nll.value), std::exp(nll.value) * nll.error};
}

nlohmann::json to_json(const Divergence& found, const Metadata& reference, const Metadata& other) {
  return {{"positions", found.positions},
          {"kl",
           {{"mean", found.kl.mean.value},
            {"error", found.kl.mean.error},
            {"median", found.kl.median},
            {"p90", found.kl.p90},
            {"p95", found.kl.p95},
            {"p99", found.kl.p99},
            {"max", found.kl.max}}},
          {"same_top", to_json(found.same_top)},
          {"delta_p", to_json(found.delta_p)},
          {"rms_delta_p", to_json(found.rms_delta_p)},
          {"reference_perplexity", to_json(perplexity(found.reference_nll))},
          {"perplexity", to_json(perplexity(found.other_nll))},
          {"nll_difference", to_json(found.nll_difference)},
          {"reference", reference},
          {"other", other}};
}

std::string name_of(Metadata about) {
  return fmt::format("{} {}{}, {}",
                     about["engine"],
                     about["dtype"],
                     about["quant"] == "none" ? "" : " " + about["quant"],
                     about["model"]);
}

void print_report(const Divergence& found, const Metadata& reference, const Metadata& other) {
  const auto line = [](const char* name, const Estimate& x, double scale, const char* unit) {
    return fmt::format(
        "{:<22} {:>12.6f} +- {:.6f}{}\n", name, scale * x.value, scale * x.error, unit);
  };
  const auto& kl = found.kl;
  auto text = fmt::format(
      "reference              {}\nother                  {}\n"
      "positions              {:>12}\n",
      name_of(reference),
      name_of(other),
      found.positions);
  text += line("mean KL", kl.mean, 1, " nats");
  text += fmt::format("KL median, max         {:>12.6f}, {:.6f}\n", kl.median, kl.max);
  text += fmt::format("KL 90 %, 95 %, 99 %    {:>12.6f}, {:.6f}, {:.6f}\n", kl.p90, kl.p95, kl.p99);
  text += line("same top token", found.same_top, 100, " %");
  text += line("mean \u0394p", found.delta_p, 100, " %");
  text += line("RMS \u0394p", found.rms_delta_p, 100, " %");
  text += line("reference perplexity", perplexity(found.reference_nll), 1, "");
  text += line("perplexity", perplexity(found.other_nll), 1, "");
  text += line("ln of their ratio", found.nll_difference, 1, "");
  print_text(text);
}

void run_compare(const KlFlags& flags) {
  const SavedDistributions saved(flags.file);
  const auto loaded = load_to_run(flags.model);
  check_vocabulary(saved, loaded);
  const auto needed = window_tokens(static_cast<int64_t>(saved.ids().size()), saved.windows());
  const auto engine = make_engine(loaded, flags.model, needed);
  catch_interrupt();
  std::vector<PositionDivergence> positions;
  {
    Progress progress("positions");
    positions = compare_with_saved(*engine, saved, shown_on(progress, ""));
  }
  const auto found = summarize(positions);
  const auto other = describe(flags, loaded, *engine);
  if (flags.json) {
    print_json(to_json(found, saved.metadata(), other));
  } else {
    print_report(found, saved.metadata(), other);
  }
}

void add_save(CLI::App& app) {
  auto* command = app.add_subcommand("save", "the distributions over a text, to a file");
  auto flags = std::make_shared<KlFlags>();
  command->add_option("-o,--out", flags->file, "the file to make")->required();
  add_resume_flag(*command, flags->resume);
  add_model_flags(*command, flags->model);
  add_text_flags(*command, flags->text);
  add_chunk_flag(*command, flags->chunk);
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->footer(
      "Takes 2 bytes for each position and token of the vocabulary: 524,288 a position. ln p is\n"
      "kept as -(code / 8192)^2, to within sqrt(-ln p) / 8192; KL below about 1e-8 is not seen.");
  command->callback([flags] { run_save(*flags); });
}

void add_compare(CLI::App& app) {
  auto* command =
      app.add_subcommand("compare", "another dtype, engine or model beside such a file");
  auto flags = std::make_shared<KlFlags>();
  command->add_option("file", flags->file, "of `gemma kl save`")->required();
  add_model_flags(*command, flags->model);
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->footer(
      "KL is of this model from the file's: the mean of sum p (ln p - ln q) in nats. delta p is "
      "the\n"
      "difference of the probabilities of the token that follows, and its RMS is llama.cpp's. "
      "Errors\n"
      "are standard errors of a mean that take positions as independent. The text is in the file.");
  command->callback([flags] { run_compare(*flags); });
}

}  // namespace

void add_kl(CLI::App& app) {
  auto* command = app.add_subcommand(
      "kl", "how far the predictions of another dtype, engine or quantisation are from saved ones");
  command->require_subcommand(1);
  add_save(*command);
  add_compare(*command);
}

}  // namespace gemma_torch::apps
