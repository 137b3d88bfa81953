#include "score_tasks.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "encode_pair.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/io/file_bytes.h"
#include "gemma_torch/io/strict_json.h"
#include "prompts.h"

namespace gemma_torch::apps {
namespace {

constexpr int kJsonDepth = 16;  // an item's own is 3; what else a record holds is free
constexpr std::string_view kPlace = "{text}";

bool has_text(const nlohmann::json& record, const char* key) {
  return record.is_object() && record.contains(key) && record[key].is_string();
}

bool has_list(const nlohmann::json& record, const char* key) {
  return record.is_object() && record.contains(key) && record[key].is_array() &&
         !record[key].empty();
}

std::vector<std::string> choices_of(const nlohmann::json& record, const std::string& where) {
  std::vector<std::string> choices;
  for (const auto& choice : record["choices"]) {
    check(choice.is_string() && !choice.get_ref<const std::string&>().empty(),
          "[score] {}: choices: expected texts, got {}",
          where,
          printable(choice.dump()));
    choices.push_back(choice.get<std::string>());
  }
  return choices;
}

// The index of the right choice: given as such, or by the choice itself.
std::optional<int64_t> answer_of(const nlohmann::json& record,
                                 const std::vector<std::string>& choices,
                                 size_t count,
                                 const std::string& where) {
  if (!record.contains("answer") || record["answer"].is_null()) {
    return {};
  }
  const auto& answer = record["answer"];
  int64_t index = -1;
  if (answer.is_number_integer()) {
    index = answer.get<int64_t>();
  } else if (answer.is_string()) {
    const auto found = std::find(choices.begin(), choices.end(), answer.get<std::string>());
    index = found == choices.end() ? -1 : found - choices.begin();
  }
  check(index >= 0 && index < static_cast<int64_t>(count),
        "[score] {}: answer: expected one of the choices or its index, 0 to {}, got {}",
        where,
        count - 1,
        printable(answer.dump()));
  return index;
}

// The last `most` tokens, <bos> among them where it was the first.
int64_t keep_end(std::vector<int64_t>& ids,
                 int64_t most,
                 const std::optional<Tokenizer>& tokenizer) {
  const auto dropped = static_cast<int64_t>(ids.size()) - most;
  if (most == 0 || dropped <= 0) {
    return 0;
  }
  const int64_t kept = tokenizer && ids[0] == tokenizer->bos_id() ? 1 : 0;
  ids.erase(ids.begin() + kept, ids.begin() + kept + dropped);
  return dropped;
}

ScoreItem item_of_ids(const nlohmann::json& record, const std::string& where) {
  ScoreItem item{.context = ids_from_json(record["ids"], where)};
  for (const auto& choice : record["choices_ids"]) {
    check(choice.is_array() && !choice.empty(),
          "[score] {}: choices_ids: expected lists of token ids, got {}",
          where,
          printable(choice.dump()));
    item.continuations.push_back(ids_from_json(choice, where));
  }
  item.answer = answer_of(record, {}, item.continuations.size(), where);
  return item;
}

ScoreItem item_of_texts(const nlohmann::json& record,
                        const PairOptions& options,
                        const std::optional<Tokenizer>& tokenizer,
                        const std::string& where) {
  const auto choices = choices_of(record, where);
  std::vector<std::string> continuations;
  std::vector<int64_t> characters;
  for (const auto& choice : choices) {
    continuations.push_back(options.delimiter + choice);
    characters.push_back(count_characters(choice));
  }
  auto item = make_item(record["context"].get<std::string>(), continuations, tokenizer);
  item.characters = std::move(characters);
  item.answer = answer_of(record, choices, choices.size(), where);
  return item;
}

void check_labels(const LabelOptions& options) {
  const auto& text = options.text_template;
  const auto place = text.find(kPlace);
  check(place != std::string::npos && text.find(kPlace, place + 1) == std::string::npos,
        "[score] --template: expected {} once, got \"{}\"",
        kPlace,
        printable(text));
  const auto& labels = options.labels;
  const std::set<std::string> different(labels.begin(), labels.end());
  check(labels.size() >= 2 && different.size() == labels.size() && !different.contains(""),
        "[score] --labels: expected at least two, all different and none empty, got {}",
        fmt::join(labels, ", "));
}

// The template around a text, and every label after it.
class LabelPrompts {
 public:
  LabelPrompts(const LabelOptions& labels,
               const PairOptions& options,
               const std::optional<Tokenizer>& tokenizer)
      : labels_(labels), options_(options), tokenizer_(tokenizer) {
    check_labels(labels);
    check(tokenizer.has_value(),
          "[score] --classify: this model has no tokenizer. Hint: --choices, lines such as "
          "{{\"ids\": [2, 818], \"choices_ids\": [[9079], [22138]]}}");
    for (const auto& label : labels.labels) {
      continuations_.push_back(options.delimiter + label);
    }
  }

  ScoreItem item(const std::string& text) const {
    CutText cut{text, 0};
    if (options_.max_tokens > 0) {
      cut = cut_text(text, options_.max_tokens, *tokenizer_);
    }
    auto whole = labels_.text_template;
    whole.replace(whole.find(kPlace), kPlace.size(), cut.text);
    auto item = make_item(whole, continuations_, tokenizer_);
    item.dropped = cut.dropped;
    return item;
  }

 private:
  const LabelOptions& labels_;
  const PairOptions& options_;
  const std::optional<Tokenizer>& tokenizer_;
  std::vector<std::string> continuations_;
};

std::optional<int64_t> label_of(const nlohmann::json& record,
                                const std::vector<std::string>& labels,
                                const std::string& where) {
  if (!record.contains("label") || record["label"].is_null()) {
    return {};
  }
  const auto& label = record["label"];
  const auto found = std::find(labels.begin(), labels.end(), label);
  check(found != labels.end(),
        "[score] {}: label: expected one of {}, got {}",
        where,
        fmt::join(labels, ", "),
        printable(label.dump()));
  return found - labels.begin();
}

}  // namespace

ScoreItem make_item(const std::string& context,
                    const std::vector<std::string>& continuations,
                    const std::optional<Tokenizer>& tokenizer) {
  check(tokenizer.has_value(),
        "[score] text: this model has no tokenizer. Hint: --ids, --continuation-ids, or lines such "
        "as {{\"ids\": [2, 818], \"choices_ids\": [[9079], [22138]], \"answer\": 0}}");
  ScoreItem item;
  for (const auto& continuation : continuations) {
    auto pair = encode_pair(context, continuation, *tokenizer);
    item.context = std::move(pair.context);  // the same for all
    item.continuations.push_back(std::move(pair.continuation));
  }
  return item;
}

std::vector<ScoreItem> read_choices(const std::string& path,
                                    const PairOptions& options,
                                    const std::optional<Tokenizer>& tokenizer) {
  std::vector<ScoreItem> items;
  for (const auto& [line, where] : read_lines(path, "an item")) {
    const auto record = parse_strict_json(line, kJsonDepth, where);
    const bool ids = has_list(record, "ids") && has_list(record, "choices_ids");
    const bool texts = has_text(record, "context") && has_list(record, "choices");
    check(
        ids != texts,
        "[score] {}: expected \"context\" and \"choices\", or \"ids\" and \"choices_ids\", got {}",
        where,
        printable(line));
    auto item = ids ? item_of_ids(record, where) : item_of_texts(record, options, tokenizer, where);
    item.dropped = keep_end(item.context, options.max_tokens, tokenizer);
    item.where = where;
    items.push_back(std::move(item));
  }
  return items;
}

std::vector<ScoreItem> read_labelled(const std::string& path,
                                     const LabelOptions& labels,
                                     const PairOptions& options,
                                     const std::optional<Tokenizer>& tokenizer) {
  const LabelPrompts prompts(labels, options, tokenizer);
  std::vector<ScoreItem> items;
  for (const auto& text : labels.content_free) {
    items.push_back(prompts.item(text));
    items.back().where = "content-free text";
  }
  for (const auto& [line, where] : read_lines(path, "a text")) {
    const auto record = parse_strict_json(line, kJsonDepth, where);
    check(
        has_text(record, "text"), "[score] {}: expected \"text\", got {}", where, printable(line));
    auto item = prompts.item(record["text"].get<std::string>());
    item.answer = label_of(record, labels.labels, where);
    item.where = where;
    items.push_back(std::move(item));
  }
  return items;
}

}  // namespace gemma_torch::apps
