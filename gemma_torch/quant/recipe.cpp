#include "gemma_torch/quant/recipe.h"

#include <algorithm>

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

template <typename Matches>
std::optional<Recipe> find(const Matches& matches) {
  const auto at = std::find_if(recipes().begin(), recipes().end(), matches);
  return at != recipes().end() ? std::optional<Recipe>(*at) : std::nullopt;
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
  return find([&](const Recipe& recipe) { return recipe.name == name; });
}

std::optional<Recipe> find_recipe(const Formats& formats) {
  return find([&](const Recipe& recipe) { return recipe.formats == formats; });
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
