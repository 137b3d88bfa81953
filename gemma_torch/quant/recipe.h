#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "gemma_torch/kernels/cpu/packed.h"

namespace gemma_torch {

/// The form of each kind of projection, by its name in a block: "W_query", .., "fc3".
using Formats = std::map<std::string, kernels::Format>;

/// A way to store the layers, under the name that --quant knows.
struct Recipe {
  std::string name;
  Formats formats;
  bool calibrated;  // rounded with the help of inputs seen (gptq.h), not to nearest
};

/// int8, mixed6, mixed5, mixed4: the number is that of most weights' bits. Values and keys have more in the mixed ones:
/// one head of each serves all queries, and they are 5 % of the weights.
const std::vector<Recipe>& recipes();

/// Nothing where there is none of the name.
std::optional<Recipe> find_recipe(const std::string& name);

/// The name of the recipe with these formats; "mixed" where there is none.
std::string recipe_name(const Formats& formats);

/// "int8, mixed6, .."
std::string recipe_names();

/// Columns of a cell of a projection: kSliceColumns where threads share out its columns, else all `in_features`.
int64_t slice_of(const std::string& projection, int64_t in_features);

}  // namespace gemma_torch
