#include "layer_list.h"

#include <charconv>
#include <string_view>

#include "gemma_torch/base/error.h"

namespace gemma_torch::apps {
namespace {

constexpr int64_t kMost = 1000;  // layers; more than any Gemma has, few enough to list

int64_t number(std::string_view word, const std::string& list) {
  int64_t value = -1;
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
  check(!word.empty() && error == std::errc() && end == word.data() + word.size() && value >= 0 &&
            value < kMost,
        "[layers] expected layers such as 5, 8-12 or 3,8-12, got \"{}\"",
        list);
  return value;
}

}  // namespace

std::vector<int64_t> parse_layers(const std::string& list) {
  std::vector<int64_t> layers;
  for (size_t start = 0; !list.empty() && start <= list.size();) {
    const auto comma = std::min(list.find(',', start), list.size());
    const auto word = std::string_view(list).substr(start, comma - start);
    const auto dash = word.find('-');
    const auto first = number(word.substr(0, dash), list);
    const auto last = dash == std::string_view::npos ? first : number(word.substr(dash + 1), list);
    check(first <= last, "[layers] \"{}\": expected {} or more after the dash", list, first);
    for (auto layer = first; layer <= last; ++layer) {
      layers.push_back(layer);
    }
    start = comma + 1;
  }
  return layers;
}

}  // namespace gemma_torch::apps
