#include <ATen/ops/logsumexp.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "common.h"
#include "gemma_torch/base/error.h"

namespace gemma_torch::apps {
namespace {

struct LogitsFlags {
  ModelOptions model;
  TextOptions text;
  int64_t top = 10;
  bool json = false;
};

nlohmann::json next_tokens(Engine& engine,
                           int64_t count,
                           const std::optional<Tokenizer>& tokenizer) {
  const auto logits = engine.logits(Rows::kLast).to(at::kCPU, at::kDouble);
  const double total = logits.logsumexp(/*dim=*/-1).item<double>();
  const auto best = engine.top(count);
  auto rows = nlohmann::json::array();
  for (int64_t i = 0; i < best.ids.size(1); ++i) {
    const auto id = best.ids.const_data_ptr<int64_t>()[i];
    const double logit = best.logits.const_data_ptr<float>()[i];
    rows.push_back({{"id", id},
                    {"piece", piece_json(id, tokenizer)},
                    {"logit", logit},
                    {"logprob", logit - total}});
  }
  return rows;
}

void print_table(const nlohmann::json& rows) {
  print_text(fmt::format("{:>8} {:>10} {:>10} {:>9}  piece\n", "id", "logit", "logprob", "prob"));
  for (const auto& row : rows) {
    const auto logprob = row["logprob"].get<double>();
    print_text(fmt::format("{:>8} {:>10.4f} {:>10.4f} {:>8.3f}%  {}\n",
                           row["id"].get<int64_t>(),
                           row["logit"].get<double>(),
                           logprob,
                           100 * std::exp(logprob),
                           row["piece"].dump()));
  }
}

void run_logits(const LogitsFlags& flags) {
  check(flags.top >= 1, "[logits] --top: expected at least 1, got {}", flags.top);
  const auto loaded = load_to_run(flags.model);
  const auto ids = read_ids(flags.text, loaded.tokenizer);
  check(!ids.empty(), "[logits] prompt: expected at least one token, got none");
  const auto engine = make_engine(loaded, flags.model, static_cast<int64_t>(ids.size()));
  engine->append(ids);
  const auto rows =
      next_tokens(*engine, std::min(flags.top, engine->vocab_size()), loaded.tokenizer);
  if (flags.json) {
    print_json({{"ids", ids}, {"top", rows}});
  } else {
    print_table(rows);
  }
}

}  // namespace

void add_logits(CLI::App& app) {
  auto* command = app.add_subcommand("logits", "the most likely next tokens after a prompt");
  auto flags = std::make_shared<LogitsFlags>();
  add_model_flags(*command, flags->model);
  add_text_flags(*command, flags->text);
  command->add_option("--top", flags->top, "how many")->capture_default_str();
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->callback([flags] { run_logits(*flags); });
}

}  // namespace gemma_torch::apps
