#include "gemma_torch/quant/recipe.h"

namespace gemma_torch {
namespace {

using kernels::Format;

Recipe make(const char* name, Format query, Format key, Format value, Format others) {
  return {name,
          {{"W_query", query},
           {"W_key", key},
           {"W_value", value},
           {"out_proj", others},
           {"fc1", others},
           {"fc2", others},
           {"fc3", others}},
          others != Format::kInt8};
}

}  // namespace

const std::vector<Recipe>& recipes() {
  static const std::vector<Recipe> all = {
      make("int8", Format::kInt8, Format::kInt8, Format::kInt8, Format::kInt8),
      make("mixed6", Format::kInt6, Format::kInt6, Format::kInt8, Format::kInt6),
      make("mixed5", Format::kInt5, Format::kInt6, Format::kInt8, Format::kInt5),
      make("mixed4", Format::kLevels4, Format::kInt6, Format::kInt8, Format::kLevels4)};
  return all;
}

std::optional<Recipe> find_recipe(const std::string& name) {
  for (const auto& recipe : recipes()) {
    if (recipe.name == name) {
      return recipe;
    }
  }
  return std::nullopt;
}

std::string recipe_name(const Formats& formats) {
  for (const auto& recipe : recipes()) {
    if (recipe.formats == formats) {
      return recipe.name;
    }
  }
  return "mixed";
}

std::string recipe_names() {
  std::string names;
  for (const auto& recipe : recipes()) {
    names += (names.empty() ? "" : ", ") + recipe.name;
  }
  return names;
}

int64_t slice_of(const std::string& projection, int64_t in_features) {
  return projection == "out_proj" || projection == "fc3" ? kernels::kSliceColumns : in_features;
}

}  // namespace gemma_torch
