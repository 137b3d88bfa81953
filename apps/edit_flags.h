#pragma once

#include <string>
#include <vector>

#include "gemma_torch/inspect/patch.h"

namespace gemma_torch::apps {

/// The grammar of --edit, for --help.
extern const char* const kEditHelp;

/// What the spellings of edits are filled in with.
struct EditContext {
  Gemma3Model model{nullptr};
  int64_t T = 0;          // tokens of the run to be edited
  at::Tensor other = {};  // ids (1, T) of the prompt that `=other` takes values from; may be absent
  uint64_t seed = 0;      // of noise
};

/// GLOB[pos=..][head=..][channels=..]=FILL, an edit for every site that the glob matches.
/// Runs the other prompt once if one of them asks for it.
/// Throws: Error quoting the edit for what the grammar has not; naming a file or its key; for a
/// glob without a site. Whether parts and values fit is for edits_probe to say.
std::vector<Edit> parse_edits(const std::vector<std::string>& texts, const EditContext& context);

}  // namespace gemma_torch::apps
