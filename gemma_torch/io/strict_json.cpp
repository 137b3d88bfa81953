#include "gemma_torch/io/strict_json.h"

#include <set>
#include <vector>

#include "gemma_torch/base/error.h"
#include "gemma_torch/io/file_bytes.h"

namespace gemma_torch {

nlohmann::json parse_strict_json(std::string_view text, int depth, const std::string& place) {
  using Event = nlohmann::json::parse_event_t;
  std::vector<std::set<std::string>> keys(static_cast<size_t>(depth) + 1);  // of the open objects
  const auto watch = [&](int level, Event event, nlohmann::json& parsed) {
    if (event == Event::object_start || event == Event::array_start) {
      check(level < depth, "[json] expected nesting of at most {}, got more ({})", depth, place);
      keys[static_cast<size_t>(level) + 1].clear();
    } else if (event == Event::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      check(keys[static_cast<size_t>(level)].insert(key).second,
            "[json] key \"{}\" appears twice ({})",
            printable(key),
            place);
    }
    return true;
  };
  try {
    return nlohmann::json::parse(text.begin(), text.end(), watch);
  } catch (const nlohmann::json::exception& error) {
    fail("[json] {} ({})", printable(error.what()), place);
  }
}

}  // namespace gemma_torch
