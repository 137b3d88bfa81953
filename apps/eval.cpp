#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "common.h"
#include "examples.h"
#include "fingerprint.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/inspect/score.h"
#include "results_file.h"
#include "token_labels.h"

namespace gemma_torch::apps {
namespace {

using json = nlohmann::json;

struct EvalFlags {
  ModelOptions model = {};
  std::string data = {};
  ExampleOptions examples = {};
  std::string out = {};
  bool answers = false;
  int64_t max_new_tokens = 64;
  bool json = false;
};

json row_of(Engine& engine,
            const Question& question,
            const EvalFlags& flags,
            const Pretrained& loaded) {
  const auto score = score_continuations(engine, question.prompt, {question.expected})[0];
  double sum = 0;
  int64_t targets = 0;
  for (size_t t = 0; t < question.expected.size(); ++t) {
    sum += question.is_target[t] ? score.log_probs[t] : 0;
    targets += question.is_target[t] ? 1 : 0;
  }
  json row = {{"nll", -sum},
              {"targets", targets},
              {"exact", question.one_answer ? json(score.is_greedy) : json()}};
  if (flags.answers) {
    const auto written = greedy_answer(engine, question.prompt, flags.max_new_tokens, loaded);
    row["prompt"] = prompt_text(question.prompt, loaded.tokenizer);
    row["expected"] = loaded.tokenizer ? json(loaded.tokenizer->decode(question.expected, true))
                                       : json(question.expected);
    row["answer"] =
        loaded.tokenizer ? json(loaded.tokenizer->decode(written, true)) : json(written);
  }
  return row;
}

json header_of(const EvalFlags& flags,
               const Pretrained& loaded,
               const Engine& engine,
               const TrainingData& data) {
  const auto report = engine.report(/*depth=*/0);
  auto header = numbers_json(loaded);
  header.update({{"format", "gemma eval 1"},
                 {"engine", report.engine},
                 {"examples", data.size()},
                 {"tokens", data.tokens()},
                 {"targets", data.targets()},
                 {"answers", flags.answers},
                 {"max_new_tokens", flags.max_new_tokens}});
  return header;
}

// Means over targets and examples, of all rows.
json summary_of(const std::vector<json>& rows) {
  double nll = 0, exact = 0;
  int64_t targets = 0, asked = 0;
  for (const auto& row : rows) {
    nll += row.at("nll").get<double>();
    targets += row.at("targets").get<int64_t>();
    if (row.at("exact").is_boolean()) {
      exact += row.at("exact").get<bool>() ? 1 : 0;
      ++asked;
    }
  }
  nll /= static_cast<double>(std::max<int64_t>(targets, 1));
  const auto share = exact / static_cast<double>(std::max<int64_t>(asked, 1));
  const auto error =
      asked > 1 ? std::sqrt(share * (1 - share) / static_cast<double>(asked - 1)) : 0;
  return {{"examples", rows.size()},
          {"targets", targets},
          {"nll", nll},
          {"perplexity", std::exp(nll)},
          {"exact", asked > 0 ? json(share) : json()},
          {"exact_stderr", asked > 1 ? json(error) : json()}};
}

std::vector<json> ask(Engine& engine,
                      const TrainingData& data,
                      const EvalFlags& flags,
                      const Pretrained& loaded) {
  std::optional<ResultsFile> file;
  std::vector<json> rows;
  if (!flags.out.empty()) {
    file.emplace(flags.out, header_of(flags, loaded, engine, data));
    rows = file->found();
  }
  Progress progress("examples");
  for (auto i = static_cast<int64_t>(rows.size()); i < data.size(); ++i) {
    check(!interrupted(),
          "[eval] stopped after {} of {} examples. {}",
          i,
          data.size(),
          file ? "Hint: the same command goes on from there"
               : "Hint: with --out a later run goes on from there");
    auto row = row_of(engine, question_of(data.example(i)), flags, loaded);
    row["line"] = data.line(i);
    if (file) {
      file->append(row);
    }
    rows.push_back(std::move(row));
    progress.show(i + 1, data.size());
  }
  return rows;
}

void run_eval(const EvalFlags& flags) {
  if (flags.answers && flags.out.empty()) {
    throw CLI::RequiresError("--answers", "--out");  // they are written nowhere else
  }
  check(flags.max_new_tokens >= 1,
        "[eval] --max-new-tokens: expected at least 1, got {}",
        flags.max_new_tokens);
  const auto loaded = load_to_run(flags.model);
  catch_interrupt();
  const auto opened = open_examples("eval", flags.data, loaded, flags.examples);
  const auto& data = *opened;
  const auto engine = make_engine(loaded, flags.model, data.longest() + flags.max_new_tokens);
  auto summary = summary_of(ask(*engine, data, flags, loaded));
  summary["data"] = flags.data;
  summary["truncated"] = data.truncated();
  summary["left_out"] = data.left_out();
  if (flags.json) {
    print_json(summary);
    return;
  }
  const auto exact = summary["exact"];
  print_text(fmt::format(
      "{} examples, {} targets: {:.4f} nats a target, perplexity {:.3f}{}\n",
      data.size(),
      summary["targets"].get<int64_t>(),
      summary["nll"].get<double>(),
      summary["perplexity"].get<double>(),
      exact.is_null() ? ""
                      : fmt::format(", {:.1f} % answered exactly", 100 * exact.get<double>())));
}

}  // namespace

void add_eval(CLI::App& app) {
  auto* command =
      app.add_subcommand("eval", "how well a model answers examples that finetune reads");
  auto flags = std::make_shared<EvalFlags>();
  command->add_option("--data", flags->data, "JSON lines of examples, as of gemma finetune")
      ->required();
  command
      ->add_option(
          "--max-tokens", flags->examples.max_tokens, "of an example; what is longer loses its end")
      ->capture_default_str();
  command->add_flag("--all-tokens", flags->examples.all_tokens, "score prompts too");
  command->add_flag("--answers", flags->answers, "write what greedy decoding answers, to --out");
  command->add_option("-n,--max-new-tokens", flags->max_new_tokens, "of an answer")
      ->capture_default_str();
  command->add_option(
      "-o,--out", flags->out, "JSON lines of results, one an example; a run that was cut goes on");
  add_model_flags(*command, flags->model);
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->footer(
      "An example is answered exactly where each token of the completion, its end included, is "
      "the\n"
      "most likely one, which is where greedy decoding writes just that.");
  command->callback([flags] { run_eval(*flags); });
}

}  // namespace gemma_torch::apps
