#include "gemma_torch/inspect/perplexity.h"

#include <fmt/format.h>

#include <cmath>

#include "common.h"
#include "gemma_torch/base/error.h"
#include "window_flags.h"

namespace gemma_torch::apps {
namespace {

struct PerplexityFlags {
  ModelOptions model;
  TextOptions text;
  int64_t chunk = 512;
  bool per_token = false;
  bool json = false;
};

nlohmann::json to_json(const std::vector<TokenScore>& scores,
                       const std::optional<Tokenizer>& tokenizer) {
  auto rows = nlohmann::json::array();
  for (const auto& score : scores) {
    rows.push_back({{"index", score.index},
                    {"id", score.id},
                    {"piece", piece_json(score.id, tokenizer)},
                    {"logprob", score.log_prob}});
  }
  return rows;
}

void run_perplexity(const PerplexityFlags& flags) {
  const auto loaded = load_to_run(flags.model);
  const auto ids = read_ids(flags.text, loaded.tokenizer);
  Progress progress("tokens");
  const WindowOptions windows{
      .chunk = flags.chunk,
      .bos_id = bos_id(loaded.tokenizer),
      .on_progress = [&](int64_t done, int64_t total) { progress.show(done, total); }};
  const auto needed = window_tokens(static_cast<int64_t>(ids.size()), windows);
  const auto engine = make_engine(loaded, flags.model, needed);
  const auto scores = score_tokens(*engine, ids, windows);
  const double nll = mean_nll(scores);
  auto per_token = flags.per_token ? to_json(scores, loaded.tokenizer) : nlohmann::json();
  if (flags.json) {
    print_json({{"tokens", scores.size()},
                {"nll", nll},
                {"perplexity", std::exp(nll)},
                {"per_token", std::move(per_token)}});
    return;
  }
  for (const auto& row : per_token) {
    print_text(fmt::format("{:>8} {:>8} {:>10.4f}  {}\n",
                           row["index"].get<int64_t>(),
                           row["id"].get<int64_t>(),
                           row["logprob"].get<double>(),
                           row["piece"].dump()));
  }
  print_text(fmt::format(
      "perplexity {:.4f}, nll {:.6f} over {} tokens\n", std::exp(nll), nll, scores.size()));
}

}  // namespace

void add_perplexity(CLI::App& app) {
  auto* command = app.add_subcommand("perplexity", "how well the model predicts a text");
  auto flags = std::make_shared<PerplexityFlags>();
  add_model_flags(*command, flags->model);
  add_text_flags(*command, flags->text);
  add_chunk_flag(*command, flags->chunk);
  command->add_flag("--per-token", flags->per_token, "the score of each token too");
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->callback([flags] { run_perplexity(*flags); });
}

}  // namespace gemma_torch::apps
