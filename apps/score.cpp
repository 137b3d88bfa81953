#include "gemma_torch/inspect/score.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <functional>
#include <memory>

#include "common.h"
#include "fingerprint.h"
#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "results_file.h"
#include "score_report.h"
#include "score_tasks.h"
#include "token_labels.h"

namespace gemma_torch::apps {
namespace {

using nlohmann::json;

struct ScoreFlags {
  ModelOptions model = {};
  TextOptions text = {};
  std::vector<std::string> continuations = {};
  std::vector<std::string> continuation_ids = {};
  std::string choices = {};  // files
  std::string classify = {};
  LabelOptions labels = {};
  PairOptions pairs = {};
  std::string out = {};
  bool json = false;

  bool one_prompt() const { return !continuations.empty() || !continuation_ids.empty(); }
};

// What --json says of how the numbers were made; also what a results file must have been made with.
json model_json(const ScoreFlags& flags, const Pretrained& loaded, const Engine& engine) {
  const auto report = engine.report(/*depth=*/0);
  const std::filesystem::path path = model_path(flags.model.model);
  const auto name = path.has_filename() ? path.filename() : path.parent_path().filename();
  return {{"model", name.string()},
          {"engine", report.engine},
          {"isa", report.isa},
          {"device", loaded.model->tok_emb->weight.device().str()},
          {"dtype", dtype_name(loaded.config.dtype)},
          {"quant", report.quant()}};
}

// The first line of a results file.
json header_json(const ScoreFlags& flags,
                 const Pretrained& loaded,
                 const Engine& engine,
                 const std::vector<ScoreItem>& items) {
  auto header = model_json(flags, loaded, engine);
  Fingerprint tokens;
  for (const auto& item : items) {
    tokens.add(item.context);
    tokens.add(item.characters);
    tokens.add(item.answer.value_or(-1));
    for (const auto& ids : item.continuations) {
      tokens.add(ids);
    }
  }
  const bool classify = !flags.classify.empty();
  header.update({{"format", "gemma score 1"},
                 {"task", classify ? "classify" : "choices"},
                 {"weights", fingerprint(loaded.model)},
                 {"kv", flags.model.kv},
                 {"products", flags.model.products},
                 {"delimiter", flags.pairs.delimiter},
                 {"max_tokens", flags.pairs.max_tokens},
                 {"labels", classify ? json(flags.labels.labels) : json()},
                 {"template", classify ? json(flags.labels.text_template) : json()},
                 {"content_free", classify ? json(flags.labels.content_free) : json()},
                 {"items", items.size()},
                 {"tokens", tokens.hex()}});
  return header;
}

// Tokens of the longest item, which is what an engine must hold.
int64_t capacity_for(const std::vector<ScoreItem>& items, int64_t most) {
  int64_t needed = 1;
  for (const auto& item : items) {
    size_t longest = 1;
    for (const auto& ids : item.continuations) {
      longest = std::max(longest, ids.size());
    }
    const auto tokens = static_cast<int64_t>(item.context.size() + longest) - 1;
    check(tokens <= most,
          "[score] {}: expected at most the model's {} tokens, got {}. Hint: --max-tokens",
          item.where,
          most,
          tokens);
    needed = std::max(needed, tokens);
  }
  return needed;
}

using MakeRow = std::function<json(
    const ScoreItem&, const std::vector<ContinuationScore>&, const std::vector<json>& before)>;

// A run over items: rows, how many of them a results file had already, and the time of the others.
struct Run {
  std::vector<json> rows = {};
  size_t resumed = 0;
  double seconds = 0;
};

Run score_items(Engine& engine,
                const std::vector<ScoreItem>& items,
                ResultsFile* file,
                const MakeRow& make_row) {
  Run run;
  if (file != nullptr) {
    run.rows = file->found();
    run.resumed = run.rows.size();
    check(run.resumed <= items.size(),
          "[results] expected at most {} rows, got {}",
          items.size(),
          run.resumed);
  }
  Progress progress("items");
  catch_interrupt();
  const auto start = std::chrono::steady_clock::now();
  for (auto i = run.resumed; i < items.size(); ++i) {
    check(!interrupted(),
          "[score] stopped after {} of {} items. {}",
          i,
          items.size(),
          file != nullptr ? "Hint: the same command goes on from there"
                          : "Hint: with --out a later run goes on from there");
    const auto scores = score_continuations(engine, items[i].context, items[i].continuations);
    run.rows.push_back(make_row(items[i], scores, run.rows));
    if (file != nullptr) {
      file->append(run.rows.back());
    }
    progress.show(static_cast<int64_t>(i) + 1, static_cast<int64_t>(items.size()));
  }
  run.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return run;
}

Run run_task(const ScoreFlags& flags,
             const Pretrained& loaded,
             const std::vector<ScoreItem>& items,
             const MakeRow& make_row,
             json& summary) {
  const auto needed = capacity_for(items, loaded.config.context_length);
  const auto engine = make_engine(loaded, flags.model, needed);
  std::optional<ResultsFile> file;
  if (!flags.out.empty()) {
    file.emplace(flags.out, header_json(flags, loaded, *engine, items));
  }
  auto run = score_items(*engine, items, file ? &*file : nullptr, make_row);
  summary = model_json(flags, loaded, *engine);
  summary["resumed"] = run.resumed;
  summary["seconds"] = run.seconds;
  return run;
}

void show(const ScoreFlags& flags, json& summary, std::string (*text)(const json&)) {
  if (flags.json) {
    print_json(summary);
    return;
  }
  print_text(text(summary) + fmt::format("{}, {} engine, {}{}\n",
                                         summary["model"].get<std::string>(),
                                         summary["engine"].get<std::string>(),
                                         summary["dtype"].get<std::string>(),
                                         summary["quant"] == "none"
                                             ? ""
                                             : ", " + summary["quant"].get<std::string>()));
}

void run_choices(const ScoreFlags& flags, const Pretrained& loaded) {
  const auto items = read_choices(flags.choices, flags.pairs, loaded.tokenizer);
  json summary;
  auto run = run_task(
      flags,
      loaded,
      items,
      [](const auto& item, const auto& scores, const auto&) { return choice_json(item, scores); },
      summary);
  summary.update(choices_summary(run.rows));
  summary["task"] = "choices";
  summary["items"] = std::move(run.rows);
  show(flags, summary, choices_text);
}

void run_classify(const ScoreFlags& flags, const Pretrained& loaded) {
  const auto items = read_labelled(flags.classify, flags.labels, flags.pairs, loaded.tokenizer);
  const auto& texts = flags.labels.content_free;
  const auto free = static_cast<std::ptrdiff_t>(texts.size());
  json summary;
  auto run = run_task(
      flags,
      loaded,
      items,
      [&](const auto& item, const auto& scores, const auto& before) {
        const bool known = before.size() >= texts.size();
        return label_json(
            item,
            scores,
            known ? std::vector<json>(before.begin(), before.begin() + free) : std::vector<json>());
      },
      summary);
  std::vector<json> rows(run.rows.begin() + free, run.rows.end());
  summary.update(labels_summary(rows, flags.labels.labels));
  summary["task"] = "classify";
  summary["template"] = flags.labels.text_template;
  for (size_t i = 0; i < texts.size(); ++i) {
    run.rows[i]["text"] = texts[i];
    summary["content_free"].push_back(run.rows[i]);
  }
  summary["items"] = std::move(rows);
  show(flags, summary, labels_text);
}

// The continuations of one prompt.
ScoreItem read_prompt(const ScoreFlags& flags, const std::optional<Tokenizer>& tokenizer) {
  ScoreItem item;
  if (flags.continuation_ids.empty()) {
    check(!flags.text.ids, "[score] --ids: expected --continuation-ids with it, got text");
    item = make_item(read_text(flags.text), flags.continuations, tokenizer);
  } else {
    check(flags.text.ids && flags.continuations.empty(),
          "[score] --continuation-ids: expected --ids with it, and no text");
    item.context = read_ids(flags.text, tokenizer);
    for (const auto& list : flags.continuation_ids) {
      item.continuations.push_back(parse_ids(list));
    }
  }
  item.where = "prompt";
  return item;
}

void run_prompt(const ScoreFlags& flags, const Pretrained& loaded) {
  const auto item = read_prompt(flags, loaded.tokenizer);
  const auto& tokenizer = loaded.tokenizer;
  json value;
  const auto run = run_task(
      flags,
      loaded,
      {item},
      [](const auto& one, const auto& scores, const auto&) { return item_json(one, scores); },
      value);
  const auto& row = run.rows[0];
  value["task"] = "continuations";
  value["context_ids"] = item.context;
  value["context_pieces"] = pieces_json(item.context, tokenizer);
  for (size_t i = 0; i < item.continuations.size(); ++i) {
    const auto& ids = item.continuations[i];
    value["continuations"].push_back({{"ids", ids},
                                      {"pieces", pieces_json(ids, tokenizer)},
                                      {"labels", token_labels(ids, tokenizer)},
                                      {"logprobs", row["logprobs"][i]},
                                      {"logprob", row["logprob"][i]},
                                      {"is_greedy", row["is_greedy"][i]}});
  }
  show(flags, value, continuations_text);
}

void check_usage(const ScoreFlags& flags) {
  const int tasks = (flags.one_prompt() ? 1 : 0) + (flags.choices.empty() ? 0 : 1) +
                    (flags.classify.empty() ? 0 : 1);
  if (tasks != 1) {
    throw CLI::RequiredError("One of --continuation, --choices and --classify");
  }
  const bool classify = !flags.classify.empty();
  if (classify && (flags.labels.labels.empty() || flags.labels.text_template.empty())) {
    throw CLI::RequiredError(flags.labels.labels.empty() ? "--labels" : "--template");
  }
  if (!classify && !(flags.labels.labels.empty() && flags.labels.text_template.empty())) {
    throw CLI::RequiresError("--labels and --template", "--classify");
  }
  const auto& text = flags.text;
  if (!flags.one_prompt() && (text.prompt || text.file || text.ids)) {
    throw CLI::RequiresError("-p, -f and --ids", "--continuation");
  }
  if (flags.one_prompt() && (!flags.out.empty() || flags.pairs.max_tokens != 0)) {
    throw CLI::RequiresError("--out and --max-tokens", "--choices or --classify");
  }
  check(flags.pairs.max_tokens >= 0,
        "[score] --max-tokens: expected at least 1, got {}",
        flags.pairs.max_tokens);
}

void run_score(const ScoreFlags& flags) {
  check_usage(flags);
  const auto loaded = load_to_run(flags.model);
  if (flags.one_prompt()) {
    run_prompt(flags, loaded);
  } else {
    flags.classify.empty() ? run_choices(flags, loaded) : run_classify(flags, loaded);
  }
}

void add_task_flags(CLI::App& command, ScoreFlags& flags) {
  const auto list = [&](const char* name, std::vector<std::string>& target, const char* help) {
    return command.add_option(name, target, help)->allow_extra_args(false);
  };
  list("-c,--continuation", flags.continuations, "of -p: ' Paris', may be repeated");
  list("--continuation-ids", flags.continuation_ids, "of --ids: 9079,236764, may be repeated");
  command.add_option("--choices", flags.choices, "JSON lines of multiple-choice items, see below");
  command.add_option("--classify", flags.classify, "JSON lines of texts and labels, see below");
  list("--labels", flags.labels.labels, "of --classify: spam,ham")->delimiter(',');
  command.add_option("--template", flags.labels.text_template, "of --classify, with {text} in it");
  list(
      "--content-free",
      flags.labels.content_free,
      "of --classify: a text that says nothing, for calibration; may be repeated [the empty text]");
  command
      .add_option("--delimiter", flags.pairs.delimiter, "between a context and its choice or label")
      ->capture_default_str();
  command.add_option("--max-tokens",
                     flags.pairs.max_tokens,
                     "of a context (its end is kept) or a text (its beginning) [all]");
  command.add_option("-o,--out",
                     flags.out,
                     "JSON lines of results, written item by item; a run that was cut goes on");
}

}  // namespace

void add_score(CLI::App& app) {
  auto* command = app.add_subcommand(
      "score", "log-likelihoods: of continuations, in multiple choice, and to classify texts");
  auto flags = std::make_shared<ScoreFlags>();
  add_text_flags(*command, flags->text);
  add_task_flags(*command, *flags);
  add_model_flags(*command, flags->model);
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->footer(
      "--choices: {\"context\": \"..\", \"choices\": [\"..\", ..], \"answer\": 2}; the answer is "
      "an index or a\n"
      "choice and may be absent; without a tokenizer {\"ids\": [..], \"choices_ids\": [[..], "
      "..]}.\n"
      "--classify: {\"text\": \"..\", \"label\": \"spam\"}; the label may be absent.\n"
      "Tokens, acc, acc_norm and stderr are those of lm-evaluation-harness 0.4.13. Calibration is\n"
      "contextual calibration (Zhao et al. 2021).");
  command->callback([flags] { run_score(*flags); });
}

}  // namespace gemma_torch::apps
