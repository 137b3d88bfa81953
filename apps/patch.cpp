#include "gemma_torch/inspect/patch.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/tensor.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>

#include "common.h"
#include "edit_flags.h"
#include "fingerprint.h"
#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "patch_sweep.h"
#include "prompts.h"
#include "results_file.h"

namespace gemma_torch::apps {
namespace {

struct PatchFlags {
  ModelOptions model = {};
  TextOptions text = {};
  TextOptions other = {};
  TokenOptions tokens = {};
  std::vector<std::string> edits = {};
  std::vector<std::string> sweep = {};
  std::optional<uint64_t> seed = {};
  std::string html = {};
  std::string out = {};
  int64_t top = 5;
  int64_t batch = 16;
  bool json = false;
};

at::Tensor as_row(const std::vector<int64_t>& ids, const Pretrained& loaded) {
  return at::tensor(ids, at::kLong).unsqueeze(0).to(loaded.model->tok_emb->weight.device());
}

void check_ids(const std::vector<int64_t>& ids, const char* what, int64_t vocab_size) {
  check(!ids.empty(), "[patch] {}: expected at least one token, got none", what);
  const auto largest = *std::max_element(ids.begin(), ids.end());  // a sign is no digit of --ids
  check(largest < vocab_size,
        "[patch] {}: expected ids from 0 to {}, got {}",
        what,
        vocab_size - 1,
        largest);
}

// What one run says of the next token.
struct Outcome {
  at::Tensor logits = {};     // (V) float64
  at::Tensor log_probs = {};  // (V)
};

Outcome run(const Pretrained& loaded, const at::Tensor& ids, const Probe& probe, bool whole) {
  auto model = loaded.model;
  const auto last = ids.size(1) - 1;
  // All logits only where they are edited: the last position's are all that is looked at.
  const auto logits = whole ? model->forward(ids, /*cache=*/nullptr, probe).select(1, last)
                            : model->out_head(model->hidden(ids, nullptr, probe).select(1, last));
  Outcome outcome{.logits = logits[0].to(at::kCPU, at::kDouble)};
  outcome.log_probs = outcome.logits.log_softmax(/*dim=*/0);
  return outcome;
}

nlohmann::json score_of(const Outcome& outcome, const std::vector<int64_t>& tokens) {
  if (tokens.empty()) {
    return {};
  }
  const auto logit = [&](int64_t id) { return outcome.logits[id].item<double>(); };
  return tokens.size() == 1 ? logit(tokens[0]) : logit(tokens[0]) - logit(tokens[1]);
}

nlohmann::json outcome_json(const Outcome& outcome,
                            const std::vector<int64_t>& tokens,
                            int64_t count,
                            const std::optional<Tokenizer>& tokenizer) {
  const auto [logits, ids] = outcome.logits.topk(std::min(count, outcome.logits.numel()));
  auto top = nlohmann::json::array();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    const auto id = ids[i].item<int64_t>();
    top.push_back({{"id", id},
                   {"piece", piece_json(id, tokenizer)},
                   {"logit", logits[i].item<double>()},
                   {"logprob", outcome.log_probs[id].item<double>()}});
  }
  return {{"score", score_of(outcome, tokens)}, {"top", top}};
}

// KL of the edited run's distribution from the plain one's, nats.
double divergence(const Outcome& before, const Outcome& after) {
  const auto& p = before.log_probs;
  return (p.exp() * (p - after.log_probs)).nan_to_num(0).sum().item<double>();
}

std::string shown(const nlohmann::json& row) {
  const auto name =
      row["piece"].is_null() ? std::to_string(row["id"].get<int64_t>()) : row["piece"].dump();
  return fmt::format("{:>7.3f} % {}", 100 * std::exp(row["logprob"].get<double>()), name);
}

void print_outcomes(const nlohmann::json& value) {
  const auto& before = value["before"]["top"];
  const auto& after = value["after"]["top"];
  std::string text = fmt::format("edited: {}\n{:<34} {}\n",
                                 fmt::join(value["sites"].get<std::vector<std::string>>(), ", "),
                                 "next token before",
                                 "and after");
  for (size_t i = 0; i < before.size(); ++i) {
    text += fmt::format("{:<34} {}\n", shown(before[i]), shown(after[i]));
  }
  if (!value["before"]["score"].is_null()) {
    text += fmt::format("logit{} {:.4f} before, {:.4f} after\n",
                        value["tokens"].size() == 2 ? " difference" : "",
                        value["before"]["score"].get<double>(),
                        value["after"]["score"].get<double>());
  }
  print_text(text + fmt::format("KL {:.5f}; seed {}\n",
                                value["kl"].get<double>(),
                                value["seed"].get<uint64_t>()));
}

void run_edits(const PatchFlags& flags,
               const Pretrained& loaded,
               const std::vector<int64_t>& ids,
               const std::vector<int64_t>& tokens) {
  check(flags.top >= 1, "[patch] --top: expected at least 1, got {}", flags.top);
  EditContext context{.model = loaded.model,
                      .T = static_cast<int64_t>(ids.size()),
                      .seed = flags.seed ? *flags.seed : std::random_device{}()};
  std::vector<int64_t> other_ids;
  if (flags.other.prompt || flags.other.ids) {
    other_ids = read_ids(flags.other, loaded.tokenizer);
    check_ids(other_ids, "--other", loaded.config.vocab_size);
    context.other = as_row(other_ids, loaded);
  }
  const auto edits = parse_edits(flags.edits, context);
  std::vector<std::string> sites;
  bool whole = false;
  for (const auto& edit : edits) {
    sites.push_back(edit.site.name());
    whole |= edit.site.site == Site::kLogits;
  }
  const auto probe = edits_probe(edits, loaded.config, context.T);
  const auto before = run(loaded, as_row(ids, loaded), {}, whole);
  const auto after = run(loaded, as_row(ids, loaded), probe, whole);
  const auto& tokenizer = loaded.tokenizer;
  const nlohmann::json value = {{"ids", ids},
                                {"pieces", pieces_json(ids, tokenizer)},
                                {"other_ids", other_ids},
                                {"edits", flags.edits},
                                {"sites", sites},
                                {"seed", context.seed},
                                {"tokens", tokens},
                                {"before", outcome_json(before, tokens, flags.top, tokenizer)},
                                {"after", outcome_json(after, tokens, flags.top, tokenizer)},
                                {"kl", divergence(before, after)}};
  flags.json ? print_json(value) : print_outcomes(value);
}

// The first line of a sweep's file of scores.
nlohmann::json header_json(const PatchFlags& flags, const Pretrained& loaded, const SweepCase& of) {
  auto header = numbers_json(loaded);
  Fingerprint clean, corrupted;
  clean.add(of.clean);
  corrupted.add(of.corrupted);
  header.update({{"format", "gemma patch sweep 1"},
                 {"sites", flags.sweep},
                 {"tokens", of.tokens},
                 {"batch", flags.batch},
                 {"clean", clean.hex()},
                 {"corrupted", corrupted.hex()}});
  return header;
}

// A row for each pass: {"scores": [..]}.
void go_on(SweepOptions& options, ResultsFile& file) {
  for (const auto& row : file.found()) {
    const auto scores = row.at("scores").get<std::vector<double>>();
    options.found.insert(options.found.end(), scores.begin(), scores.end());
  }
  options.on_scores = [&file](const auto& scores) { file.append({{"scores", scores}}); };
}

void run_sweep(const PatchFlags& flags,
               const Pretrained& loaded,
               const std::vector<int64_t>& clean,
               const std::vector<int64_t>& tokens) {
  check(flags.other.prompt || flags.other.ids, "[sweep] --corrupted: expected a prompt, got none");
  const SweepCase of{clean, read_ids(flags.other, loaded.tokenizer), tokens};
  check_ids(of.corrupted, "--corrupted", loaded.config.vocab_size);
  Progress progress("patched");
  SweepOptions options{.sites = sweep_sites(flags.sweep), .tokens = tokens, .batch = flags.batch};
  options.on_progress = [&](int64_t done, int64_t total) {
    progress.show(done, total);
    return !interrupted();
  };
  std::optional<ResultsFile> file;
  if (!flags.out.empty()) {
    file.emplace(flags.out, header_json(flags, loaded, of));
    go_on(options, *file);
  }
  catch_interrupt();
  const auto result =
      sweep(loaded.model, as_row(clean, loaded), as_row(of.corrupted, loaded), options);
  if (!flags.html.empty()) {
    write_file(flags.html, sweep_page(result, of, loaded.tokenizer));
  }
  if (flags.json) {
    print_json(sweep_json(result, of, loaded.tokenizer));
  } else {
    print_text(sweep_text(result, of, loaded.tokenizer));
  }
}

void run_patch(const PatchFlags& flags) {
  const bool swept = !flags.sweep.empty();
  if (swept == !flags.edits.empty()) {
    throw CLI::RequiredError(swept ? "Either --edit or --sweep" : "--edit or --sweep");
  }
  if (!swept && !(flags.html.empty() && flags.out.empty())) {
    throw CLI::RequiresError("--html and --out", "--sweep");
  }
  if (swept && !flags.tokens.given()) {
    throw CLI::RequiredError("--tokens");
  }
  const auto loaded = load_modules("patch", flags.model);
  const at::NoGradGuard no_grad;
  const auto ids = read_ids(flags.text, loaded.tokenizer);
  check_ids(ids, "prompt", loaded.config.vocab_size);
  const auto tokens = read_tokens(flags.tokens, loaded.tokenizer);
  check(tokens.size() <= 2, "[tokens] expected one or two, got {}", tokens.size());
  if (!tokens.empty()) {
    check_ids(tokens, "--tokens", loaded.config.vocab_size);
  }
  swept ? run_sweep(flags, loaded, ids, tokens) : run_edits(flags, loaded, ids, tokens);
}

}  // namespace

void add_patch(CLI::App& app) {
  auto* command = app.add_subcommand(
      "patch", "replaces values inside the model, and shows what that does to the next token");
  auto flags = std::make_shared<PatchFlags>();
  const auto text = [&](const char* name, std::optional<std::string>& target, const char* help) {
    command->add_option_function<std::string>(
        name, [&target](const std::string& value) { target = value; }, help);
  };
  command->add_option("--edit", flags->edits, "SITE[..]=FILL, see below; may be repeated")
      ->allow_extra_args(false);
  command
      ->add_option("--sweep",
                   flags->sweep,
                   "instead: sites such as resid_post,z, each replaced by the clean run's (-p) in "
                   "the run of --corrupted, layer by position, or by head where there are any")
      ->delimiter(',')
      ->allow_extra_args(false);
  add_text_flags(*command, flags->text);
  text("--other,--corrupted", flags->other.prompt, "the second prompt, of as many tokens");
  text("--other-ids,--corrupted-ids", flags->other.ids, "the same by ids");
  add_token_flags(*command, flags->tokens);
  command->add_option("--top", flags->top, "how many next tokens")->capture_default_str();
  command->add_option("--seed", flags->seed, "of noise [random, printed]");
  command->add_option("--html", flags->html, "of a sweep: a page with its heatmaps");
  command->add_option("-o,--out",
                      flags->out,
                      "of a sweep: JSON lines of its scores, written pass by pass; a run that was "
                      "cut goes on");
  command->add_option("--batch", flags->batch, "of a sweep: patched runs in one pass")
      ->capture_default_str();
  add_module_flags(*command, flags->model);
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->footer(kEditHelp);
  command->callback([flags] { run_patch(*flags); });
}

}  // namespace gemma_torch::apps
