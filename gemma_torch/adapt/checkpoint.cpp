#include "gemma_torch/adapt/checkpoint.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/io/hf_folder.h"
#include "gemma_torch/io/safetensors.h"

namespace gemma_torch {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPrefix = "step-";
constexpr char kState[] = "state.safetensors";
constexpr char kFacts[] = "facts.json";

// The step of a checkpoint's name; -1 for any other name.
int64_t step_of(const std::string& name) {
  int64_t step = -1;
  if (!name.starts_with(kPrefix)) {
    return -1;
  }
  const auto* end = name.data() + name.size();
  const auto read = std::from_chars(name.data() + kPrefix.size(), end, step);
  return read.ec == std::errc() && read.ptr == end ? step : -1;
}

}  // namespace

Checkpoints::Checkpoints(std::string folder) : folder_(std::move(folder)) {
  std::error_code reason;
  fs::create_directories(folder_, reason);
  check(!reason, "[checkpoint] {}: {}", folder_, reason.message());
  for (const auto& entry : fs::directory_iterator(folder_)) {
    const auto name = entry.path().filename().string();
    const auto dot = name.find('.');  // a temporary name: step-00000120.aB3dEf
    if (dot != std::string::npos && step_of(name.substr(0, dot)) >= 0) {
      fs::remove_all(entry.path());
    }
  }
}

std::string Checkpoints::path(int64_t step) const {
  return fmt::format("{}/{}{:08}", folder_, kPrefix, step);
}

std::vector<int64_t> Checkpoints::steps() const {
  std::vector<int64_t> steps;
  for (const auto& entry : fs::directory_iterator(folder_)) {
    if (const auto step = step_of(entry.path().filename().string()); step >= 0) {
      steps.push_back(step);
    }
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

void Checkpoints::save(const Trainer& trainer, const nlohmann::json& facts) {
  if (fs::exists(path(trainer.steps()))) {
    return;  // saved already: a step has one state
  }
  AtomicFolder out(path(trainer.steps()));
  save_safetensors(out.file(kState), trainer.state(), {});
  write_file(out.file(kFacts), facts.dump(2) + "\n");
  out.commit();
}

void Checkpoints::load(int64_t step, Trainer& trainer) const {
  const auto file = path(step) + "/" + kState;
  try {
    trainer.load(load_safetensors(file));
  } catch (const Error& error) {
    fail("[checkpoint] {}: {}", file, error.what());
  }
}

nlohmann::json Checkpoints::facts(int64_t step) const {
  auto facts = read_json(path(step), kFacts);
  check(facts.is_object(), "[checkpoint] {}/{}: expected a JSON object", path(step), kFacts);
  return facts;
}

void Checkpoints::keep_only(const std::vector<int64_t>& wanted) {
  for (const auto step : steps()) {
    if (std::find(wanted.begin(), wanted.end(), step) == wanted.end()) {
      // Renamed first: a removal that is cut must not leave half a checkpoint under its name.
      const auto gone = path(step) + ".gone";
      std::error_code reason;
      fs::rename(path(step), gone, reason);
      check(!reason, "[checkpoint] {}: {}", path(step), reason.message());
      fs::remove_all(gone, reason);
    }
  }
}

}  // namespace gemma_torch
