#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace gemma_torch {

/// Parses JSON that comes with weights, where a repeated key or bottomless nesting is a damaged or
/// hostile file. `depth` is the number of arrays and objects that may lie inside each other;
/// `place` is named in messages. Throws: Error (one line) for bad JSON, invalid UTF-8, a repeated
/// key, deeper nesting.
nlohmann::json parse_strict_json(std::string_view text, int depth, const std::string& place);

}  // namespace gemma_torch
