#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace gemma_torch {

/// Ends streamed text at the first stop string, never showing a part of one.
///
/// The stop string that is complete first wins, the longest of those that end at the same byte: so
/// the outcome does not depend on how the text is cut into pieces, and nothing waits for a longer
/// match that may never come. The text ends where the winner begins; it and all after it are
/// dropped.
class StopStrings {
 public:
  /// No stop strings: all text passes. Throws: Error if one of them is empty.
  explicit StopStrings(std::vector<std::string> stops);

  /// The text, of this and earlier calls, that is now known not to belong to a stop string.
  std::string push(std::string_view text);

  bool stopped() const { return !matched_.empty(); }
  /// The stop string that was found; empty before.
  const std::string& matched() const { return matched_; }

  /// The end of the text has come: what was held back as the possible begin of a stop string.
  std::string flush();

 private:
  std::vector<std::string> stops_;
  std::string held_;  // a proper prefix of some stop string
  std::string matched_;
};

}  // namespace gemma_torch
