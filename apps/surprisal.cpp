#include "gemma_torch/inspect/surprisal.h"

#include <fmt/format.h>

#include <cmath>
#include <limits>

#include "common.h"
#include "csv.h"
#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "page.h"
#include "surprisal_words.h"
#include "token_labels.h"
#include "window_flags.h"

namespace gemma_torch::apps {
namespace {

struct SurprisalFlags {
  ModelOptions model = {};
  TextOptions text = {};
  int64_t context = 0;
  bool words = false;
  std::string csv = {};
  std::string html = {};
  bool json = false;
};

using Scores = std::vector<TokenSurprisal>;

nlohmann::json tokens_json(const Scores& scores, const std::optional<Tokenizer>& tokenizer) {
  auto rows = nlohmann::json::array();
  for (const auto& at : scores) {
    rows.push_back({{"index", at.score.index},
                    {"id", at.score.id},
                    {"piece", piece_json(at.score.id, tokenizer)},
                    {"logprob", at.score.log_prob},
                    {"surprisal_bits", at.bits},
                    {"entropy_bits", at.entropy_bits},
                    {"rank", at.rank}});
  }
  return rows;
}

nlohmann::json words_json(const std::vector<WordSurprisal>& words) {
  auto rows = nlohmann::json::array();
  for (const auto& word : words) {
    rows.push_back({{"first", word.first},
                    {"tokens", word.tokens},
                    {"word", word.text},
                    {"surprisal_bits", word.bits}});
  }
  return rows;
}

// The columns of a CSV file are the fields of the JSON rows, in this order.
void write_csv(const std::string& path,
               const std::vector<std::string>& columns,
               const nlohmann::json& rows) {
  AtomicFile file(path);
  const auto write = [&](const std::vector<std::string>& cells) {
    const auto line = csv_line(cells);
    file.write(line.data(), line.size());
  };
  write(columns);
  for (const auto& row : rows) {
    std::vector<std::string> cells;
    for (const auto& column : columns) {
      const auto& value = row[column];
      cells.push_back(value.is_string() ? value.get<std::string>()
                      : value.is_null() ? ""
                                        : value.dump());
    }
    write(cells);
  }
  file.commit();
}

double mean_of(const Scores& scores, double TokenSurprisal::* member) {
  double sum = 0;
  for (const auto& at : scores) {
    sum += at.*member;
  }
  return sum / static_cast<double>(scores.size());
}

std::string page(const std::vector<int64_t>& ids,
                 const Scores& scores,
                 const std::optional<Tokenizer>& tokenizer,
                 const std::string& note) {
  ColouredText text{.title = "Surprisal, bits a token", .note = note};
  for (const auto id : ids) {
    text.tokens.push_back(token_text(id, tokenizer));
  }
  text.values.assign(ids.size(), std::numeric_limits<double>::quiet_NaN());
  text.captions.assign(ids.size(), "not scored");
  for (const auto& at : scores) {
    const auto index = static_cast<size_t>(at.score.index);
    text.values[index] = at.bits;
    text.captions[index] = fmt::format("{}: {:.2f} bits, {:.2f} expected, rank {}, p {:.3g}",
                                       token_label(at.score.id, tokenizer),
                                       at.bits,
                                       at.entropy_bits,
                                       at.rank,
                                       std::exp(at.score.log_prob));
  }
  return html_page("gemma surprisal", "<h1>gemma surprisal</h1>" + coloured_text_html(text));
}

void print_rows(const Scores& scores, const std::optional<Tokenizer>& tokenizer) {
  auto text = fmt::format(
      "{:>8} {:>8} {:>10} {:>10} {:>8}  piece\n", "index", "id", "bits", "expected", "rank");
  for (const auto& at : scores) {
    text += fmt::format("{:>8} {:>8} {:>10.3f} {:>10.3f} {:>8}  {}\n",
                        at.score.index,
                        at.score.id,
                        at.bits,
                        at.entropy_bits,
                        at.rank,
                        token_label(at.score.id, tokenizer));
  }
  print_text(text);
}

void print_words(const std::vector<WordSurprisal>& words) {
  auto text = fmt::format("{:>8} {:>8} {:>10}  word\n", "first", "tokens", "bits");
  for (const auto& word : words) {
    text +=
        fmt::format("{:>8} {:>8} {:>10.3f}  {}\n", word.first, word.tokens, word.bits, word.text);
  }
  print_text(text);
}

Scores measure(const SurprisalFlags& flags,
               const Pretrained& loaded,
               const std::vector<int64_t>& ids) {
  const WindowOptions windows{
      .chunk = flags.context, .bos_id = bos_id(loaded.tokenizer), .sliding = true};
  const auto needed = window_tokens(static_cast<int64_t>(ids.size()), windows);
  const auto engine = make_engine(loaded, flags.model, needed);
  catch_interrupt();
  Progress progress("tokens");
  auto shown = windows;
  shown.on_progress = [&](int64_t done, int64_t total) {
    progress.show(done, total);
    check(!interrupted(), "[surprisal] interrupted; nothing was written");
  };
  return surprisals(*engine, ids, shown);
}

void write_files(const SurprisalFlags& flags, const nlohmann::json& rows, const std::string& html) {
  if (!flags.csv.empty()) {
    const auto columns =
        flags.words
            ? std::vector<std::string>{"first", "tokens", "word", "surprisal_bits"}
            : std::vector<std::string>{
                  "index", "id", "piece", "logprob", "surprisal_bits", "entropy_bits", "rank"};
    write_csv(flags.csv, columns, rows);
  }
  if (!flags.html.empty()) {
    write_file(flags.html, html);
  }
}

void run_surprisal(const SurprisalFlags& flags) {
  const auto loaded = load_to_run(flags.model);
  check(!flags.words || loaded.tokenizer, "[surprisal] --words: this model has no tokenizer");
  const auto ids = read_ids(flags.text, loaded.tokenizer);
  const auto scores = measure(flags, loaded, ids);
  const auto words =
      flags.words ? word_surprisals(scores, *loaded.tokenizer) : std::vector<WordSurprisal>();
  const auto mean = mean_of(scores, &TokenSurprisal::bits);
  const auto summary = fmt::format("{:.4f} bits a token, {:.4f} expected, over {} tokens",
                                   mean,
                                   mean_of(scores, &TokenSurprisal::entropy_bits),
                                   scores.size());
  const auto tokens = tokens_json(scores, loaded.tokenizer);
  write_files(flags,
              flags.words ? words_json(words) : tokens,
              page(ids, scores, loaded.tokenizer, summary));
  if (flags.json) {
    print_json({{"tokens", scores.size()},
                {"mean_bits", mean},
                {"mean_entropy_bits", mean_of(scores, &TokenSurprisal::entropy_bits)},
                {"per_token", tokens},
                {"words", flags.words ? words_json(words) : nlohmann::json()}});
    return;
  }
  if (flags.csv.empty() && flags.html.empty()) {
    flags.words ? print_words(words) : print_rows(scores, loaded.tokenizer);
  }
  print_text(summary + "\n");
}

}  // namespace

void add_surprisal(CLI::App& app) {
  auto* command =
      app.add_subcommand("surprisal", "how unexpected each token or word of a text is, in bits");
  auto flags = std::make_shared<SurprisalFlags>();
  add_model_flags(*command, flags->model);
  add_text_flags(*command, flags->text);
  command
      ->add_option(
          "-c,--context",
          flags->context,
          "tokens of a window; windows overlap by half and begin with <bos>, and each token "
          "has at least half a window before it where the text does; 0: the whole text as "
          "one sequence")
      ->capture_default_str();
  command->add_flag(
      "--words",
      flags->words,
      "sums over words, cut at white space; in the text and the CSV in place of tokens");
  command->add_option("--csv", flags->csv, "file for a row for each token, or with --words word");
  command->add_option("--html", flags->html, "file for a page with the text coloured");
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->callback([flags] { run_surprisal(*flags); });
}

}  // namespace gemma_torch::apps
