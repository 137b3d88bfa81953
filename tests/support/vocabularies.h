#pragma once

#include <fmt/format.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "gemma_torch/base/vocabulary.h"
#include "gemma_torch/io/gguf.h"
#include "gemma_torch/io/gguf_model.h"
#include "gemma_torch/text/model_proto.h"
#include "gemma_torch/text/tokenizer_json.h"
#include "support/real_model.h"

// Ids of small_vocabulary() that tests name.
inline constexpr int64_t kBos = 2, kTurn = 4, kNewline = 6, kTwoSpaces = 8, kThreeSpaces = 9;
inline constexpr int64_t kTag = 10, kFirstByte = 12, kSpace = 268, kA = 269, kB = 270, kC = 271;
inline constexpr int64_t kD = 272, kAb = 277, kSpaceA = 278, kAbc = 279, kCd = 280;

/// 300 pieces with every type that Gemma's vocabulary has: specials, runs, bytes, a few merges.
inline gemma_torch::Vocabulary small_vocabulary() {
  using gemma_torch::PieceType;
  gemma_torch::Vocabulary vocabulary;
  const auto add = [&](const std::string& text, PieceType type) {
    const auto id = static_cast<float>(vocabulary.pieces.size());
    const float score = type == PieceType::kNormal ? -id : 0.0F;
    vocabulary.pieces.push_back({.text = text, .score = score, .type = type});
  };
  for (const char* text :
       {"<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"}) {
    add(text, std::string(text) == "<unk>" ? PieceType::kUnknown : PieceType::kControl);
  }
  for (const char* text : {"\n", "\n\n", "▁▁", "▁▁▁", "<b>", "<unused0>"}) {
    add(text, PieceType::kUserDefined);
  }
  for (int byte = 0; byte < 256; ++byte) {
    add(fmt::format("<0x{:02X}>", byte), PieceType::kByte);
  }
  for (const char* text :
       {"▁", "a", "b", "c", "d", "e", "f", "g", "h", "ab", "▁a", "abc", "cd", "é"}) {
    add(text, PieceType::kNormal);
  }
  for (char c = 'A'; vocabulary.pieces.size() < 300; ++c) {
    add(std::string(1, c), PieceType::kNormal);
  }
  return vocabulary;
}

/// Real vocabularies on this machine, by the file they were read from: those of the real model's
/// folder, and what GEMMA_TORCH_TEST_TOKENIZER_JSON and GEMMA_TORCH_TEST_GGUF name.
inline std::vector<std::pair<std::string, gemma_torch::Vocabulary>> real_vocabularies() {
  std::vector<std::pair<std::string, gemma_torch::Vocabulary>> found;
  const auto model = real_model_dir();
  if (model && std::filesystem::exists(*model + "/tokenizer.model")) {
    const std::string path = *model + "/tokenizer.model";
    found.emplace_back(path, gemma_torch::read_tokenizer_model(path));
  }
  if (model && std::filesystem::exists(*model + "/tokenizer.json")) {
    const std::string path = *model + "/tokenizer.json";
    found.emplace_back(path, gemma_torch::read_tokenizer_json(path));
  }
  if (const auto path = environment("GEMMA_TORCH_TEST_TOKENIZER_JSON")) {
    found.emplace_back(*path, gemma_torch::read_tokenizer_json(*path));
  }
  if (const auto path = environment("GEMMA_TORCH_TEST_GGUF")) {
    found.emplace_back(*path, gemma_torch::gguf_vocabulary(gemma_torch::GgufFile(*path)));
  }
  return found;
}

/// `text` with every U+2581 written as a space.
inline std::string marks_to_spaces(std::string text) {
  for (size_t at = 0; (at = text.find("\u2581")) != std::string::npos;) {
    text.replace(at, /*bytes of U+2581=*/3, /*count=*/1, ' ');
  }
  return text;
}

/// golden/tokenizer_goldens.json; its "meta" says what is inside and which versions made it.
inline nlohmann::json tokenizer_goldens() {
  std::ifstream file(GEMMA_TORCH_GOLDEN_DIR "/tokenizer_goldens.json");
  return nlohmann::json::parse(file);
}
