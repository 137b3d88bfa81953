#include "gemma_torch/text/utf8.h"

#include <cstdint>

namespace gemma_torch {
namespace {

// Bytes of the character that begins with `lead`, and the range of its second byte (RFC 3629, table
// in section 4): that range alone excludes overlong forms, surrogates and values above U+10FFFF.
struct Form {
  size_t length;
  uint8_t low;
  uint8_t high;
};

Form form_of(uint8_t lead) {
  if (lead >= 0xC2 && lead <= 0xDF) {
    return {2, 0x80, 0xBF};
  }
  if (lead >= 0xE0 && lead <= 0xEF) {
    return {3, uint8_t(lead == 0xE0 ? 0xA0 : 0x80), uint8_t(lead == 0xED ? 0x9F : 0xBF)};
  }
  if (lead >= 0xF0 && lead <= 0xF4) {
    return {4, uint8_t(lead == 0xF0 ? 0x90 : 0x80), uint8_t(lead == 0xF4 ? 0x8F : 0xBF)};
  }
  return {0, 0, 0};  // a continuation byte, or one that no character begins with
}

}  // namespace

size_t valid_utf8_prefix(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  size_t at = 0;
  while (at < text.size()) {
    if (byte(at) < 0x80) {
      ++at;
      continue;
    }
    const Form form = form_of(byte(at));
    if (form.length == 0 || text.size() - at < form.length || byte(at + 1) < form.low ||
        byte(at + 1) > form.high) {
      return at;
    }
    for (size_t i = 2; i < form.length; ++i) {
      if ((byte(at + i) & 0xC0) != 0x80) {
        return at;
      }
    }
    at += form.length;
  }
  return at;
}

}  // namespace gemma_torch
