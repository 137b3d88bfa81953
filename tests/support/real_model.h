#pragma once

#include <cstdlib>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>

// Tests on the real weights carry the tag [real]. They take the HF folder that
// GEMMA_TORCH_TEST_MODEL names, else the one that cmake/run.sh fetched into the user's cache.

inline constexpr const char* kNoRealModel =
    "Skipped: real weights not found. Hint: bash cmake/test.sh fetches them";

/// The value of an environment variable; nothing if it is unset or empty.
inline std::optional<std::string> environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == '\0' ? std::nullopt : std::optional<std::string>(value);
}

/// A folder with config.json, model.safetensors and a tokenizer, if this machine has one.
/// Throws if GEMMA_TORCH_TEST_MODEL names something that is no folder: a typing error must not skip
/// tests.
inline std::optional<std::string> real_model_dir() {
  namespace fs = std::filesystem;
  if (const auto given = environment("GEMMA_TORCH_TEST_MODEL")) {
    if (!fs::is_directory(*given)) {
      throw std::runtime_error("GEMMA_TORCH_TEST_MODEL: " + *given + " is not a folder");
    }
    return given;
  }
  fs::path cache;
  if (const auto own = environment("GEMMA_TORCH_CACHE")) {
    cache = *own;
  } else if (const auto xdg = environment("XDG_CACHE_HOME")) {
    cache = fs::path(*xdg) / "gemma_torch";
  } else if (const auto home = environment("HOME")) {
    cache = fs::path(*home) / ".cache" / "gemma_torch";
  } else {
    return std::nullopt;
  }
  const fs::path model = cache / "gemma-3-270m";
  return fs::is_directory(model) ? std::optional<std::string>(model.string()) : std::nullopt;
}
