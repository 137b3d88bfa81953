#include "gemma_torch/text/tokenizer_json.h"

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <unordered_set>
#include <vector>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/text/vocabulary_rules.h"

namespace gemma_torch {
namespace {

using nlohmann::json;

constexpr int kDeepest = 64;                        // Gemma's file nests 6 deep
constexpr size_t kLargestFile = size_t{256} << 20;  // and has 33 MB
constexpr uint64_t kMostPieces = uint64_t{1} << 24;

const json& member(const json& object, const char* key, json::value_t type) {
  check(object.is_object() && object.contains(key), "lacks {:?}", key);
  const json& value = object.at(key);
  check(value.type() == type,
        "{}: expected {}, got {}",
        key,
        json(type).type_name(),
        value.type_name());
  return value;
}

// The start of a text that may be long, for messages.
std::string_view head(std::string_view text) {
  return text.substr(0, 40);
}

size_t id_of(const json& value, std::string_view text) {
  if (!value.is_number_unsigned() || value.get<uint64_t>() >= kMostPieces) {
    const bool number = value.is_number();
    fail("the id of {:?}: expected 0 .. {}, got {}",
         head(text),
         kMostPieces - 1,
         number ? value.dump() : value.type_name());
  }
  return value.get<size_t>();
}

struct Entry {
  std::string text;
  size_t id;
};

// The vocabulary stands aside as a list, and the merges, half of the file, are left out: as JSON values they would take
// most of the time and the memory.
struct File {
  json rest;
  std::vector<Entry> vocabulary;
};

File parse_file(std::string_view text) {
  using Event = json::parse_event_t;
  File file;
  bool in_model = false;
  std::string part;                  // of the model
  std::optional<std::string> piece;  // whose id comes next
  const auto keep = [&](int depth, Event event, json& value) {
    check(depth <= kDeepest, "nested deeper than {}", kDeepest);
    if (event == Event::key) {
      auto& key = value.get_ref<std::string&>();
      if (depth == 1) {
        in_model = key == "model";
      } else if (depth == 2) {
        part = in_model ? key : "";
      } else if (depth == 3 && part == "vocab") {
        piece = std::move(key);
        return false;
      }
      return true;
    }
    if (depth == 3 && piece) {
      const bool start = event == Event::array_start || event == Event::object_start;
      const auto id = id_of(start ? json::array() : value, *piece);
      file.vocabulary.push_back({std::move(*piece), id});
      piece.reset();
    }
    return !(event == Event::array_start && depth == 2 && part == "merges");
  };
  try {
    file.rest = json::parse(text, keep);
  } catch (const json::parse_error& error) {
    fail("not valid JSON at byte {}", error.byte);
  } catch (const json::out_of_range&) {
    fail("a number out of range");  // 1e999
  }
  return file;
}

void check_kind(const json& file) {
  const json& model = member(file, "model", json::value_t::object);
  const json& kind = member(model, "type", json::value_t::string);
  check(kind == "BPE",
        "model.type: expected BPE, got {:?}",
        head(kind.get_ref<const std::string&>()));
  check(member(model, "byte_fallback", json::value_t::boolean) == true,
        "model.byte_fallback: expected true, got false");
  const json& normalizer = member(file, "normalizer", json::value_t::object);
  const auto gemma = json{
      {"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", std::string(kSpaceMark)}};
  check(normalizer == gemma,
        "normalizer: expected one that replaces spaces by U+2581, got another");
}

/// Pieces by id; a slot stays empty until its piece comes.
class Slots {
 public:
  explicit Slots(size_t size) : pieces_(size) {}

  void put(size_t id, const std::string& text, PieceType type) {
    check(id < pieces_.size(),
          "{:?}: id {} in a vocabulary of {} pieces",
          head(text),
          id,
          pieces_.size());
    Piece& slot = pieces_[id];
    check(slot.text.empty() || slot.text == text,
          "id {} belongs to both {:?} and {:?}",
          id,
          head(slot.text),
          head(text));
    slot = {.text = text, .score = -static_cast<float>(id), .type = type};
  }

  Vocabulary take() {
    for (size_t id = 0; id < pieces_.size(); ++id) {
      check(!pieces_[id].text.empty(), "no piece has the id {}", id);
    }
    return {std::move(pieces_)};
  }

 private:
  std::vector<Piece> pieces_;
};

Vocabulary pieces_of(const File& file) {
  check_kind(file.rest);
  member(file.rest.at("model"), "vocab", json::value_t::object);
  const json& added = member(file.rest, "added_tokens", json::value_t::array);
  // An added token may repeat a piece of the vocabulary or be a new one.
  std::unordered_set<std::string_view> known(2 * file.vocabulary.size());
  for (const auto& entry : file.vocabulary) {
    known.insert(entry.text);
  }
  size_t count = known.size();
  for (const json& token : added) {
    const json& text = member(token, "content", json::value_t::string);
    count += known.contains(text.get_ref<const std::string&>()) ? 0 : 1;
  }
  Slots slots(count);
  for (const auto& [text, id] : file.vocabulary) {
    const bool byte = byte_of_piece(text) >= 0;
    slots.put(id, text, byte ? PieceType::kByte : PieceType::kNormal);
  }
  for (const json& token : added) {
    const auto& text = token.at("content").get_ref<const std::string&>();
    check(token.contains("id"), "added token {:?} lacks an id", head(text));
    slots.put(id_of(token.at("id"), text), text, PieceType::kUserDefined);
  }
  return slots.take();
}

}  // namespace

Vocabulary parse_tokenizer_json(std::string_view text, const std::string& place) {
  try {
    auto vocabulary = normalize_gguf_vocabulary(pieces_of(parse_file(text)));
    check_vocabulary(vocabulary);
    return vocabulary;
  } catch (const Error& error) {
    fail("[tokenizer.json] {} ({})", error.what(), place);
  }
}

Vocabulary read_tokenizer_json(const std::string& path) {
  return parse_tokenizer_json(read_file(path, kLargestFile), path);
}

}  // namespace gemma_torch
