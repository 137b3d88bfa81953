#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace gemma_torch {

/// Every failure of this library. The message is one line: `[operation] what, expected, got (place)`,
/// with ` Hint: ...` at the end where the user can act on it.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Throws Error with the formatted message.
template <typename... Args>
[[noreturn]] void fail(fmt::format_string<Args...> message, Args&&... args) {
  throw Error(fmt::format(message, std::forward<Args>(args)...));
}

/// Throws Error with the formatted message unless `ok`. The arguments are evaluated either way: keep them cheap.
template <typename... Args>
void check(bool ok, fmt::format_string<Args...> message, Args&&... args) {
  if (!ok) [[unlikely]] {
    throw Error(fmt::format(message, std::forward<Args>(args)...));
  }
}

}  // namespace gemma_torch
