#include "gemma_torch/text/stop_strings.h"

#include <algorithm>
#include <utility>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

// The longest end of `text` that a proper prefix of `stop` equals, in bytes.
size_t begun(std::string_view text, std::string_view stop) {
  size_t length = std::min(text.size(), stop.size() - 1);
  while (length > 0 && !text.ends_with(stop.substr(0, length))) {
    --length;
  }
  return length;
}

}  // namespace

StopStrings::StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (const std::string& stop : stops_) {
    check(!stop.empty(), "[stop] a stop string is empty");
  }
}

std::string StopStrings::push(std::string_view text) {
  if (stopped()) {
    return {};
  }
  std::string pending = std::exchange(held_, {});
  pending += text;
  size_t end = std::string::npos;
  for (const std::string& stop : stops_) {
    const size_t start = pending.find(stop);
    if (start == std::string::npos) {
      continue;
    }
    const size_t stop_end = start + stop.size();
    if (stop_end < end || (stop_end == end && stop.size() > matched_.size())) {
      end = stop_end;
      matched_ = stop;
    }
  }
  if (stopped()) {
    return pending.substr(0, end - matched_.size());
  }
  size_t keep = 0;
  for (const std::string& stop : stops_) {
    keep = std::max(keep, begun(pending, stop));
  }
  held_ = pending.substr(pending.size() - keep);
  pending.resize(pending.size() - keep);
  return pending;
}

std::string StopStrings::flush() {
  return std::exchange(held_, {});
}

}  // namespace gemma_torch
