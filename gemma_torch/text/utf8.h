#pragma once

#include <cstddef>
#include <string_view>

namespace gemma_torch {

/// How many bytes at the start of `text` are well-formed UTF-8; text.size() when all of it is.
/// Refused are overlong forms, surrogates and code points above U+10FFFF (RFC 3629), as Python and
/// Rust refuse them, so that a byte run decodes here exactly when it decodes there.
size_t valid_utf8_prefix(std::string_view text);

inline bool is_utf8(std::string_view text) {
  return valid_utf8_prefix(text) == text.size();
}

}  // namespace gemma_torch
