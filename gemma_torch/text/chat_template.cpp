#include "gemma_torch/text/chat_template.h"

#include <array>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

constexpr std::string_view kStart = "<start_of_turn>";
constexpr std::string_view kEnd = "<end_of_turn>";
constexpr std::string_view kReplyPrompt = "<start_of_turn>model\n";

// Every character for which Python's str.isspace() holds.
constexpr std::array<std::string_view, 29> kWhiteSpace = {
    "\t",           "\n",           "\v",           "\f",           "\r",
    "\x1C",         "\x1D",         "\x1E",         "\x1F",         " ",
    "\xC2\x85",     "\xC2\xA0",     "\xE1\x9A\x80", "\xE2\x80\x80", "\xE2\x80\x81",
    "\xE2\x80\x82", "\xE2\x80\x83", "\xE2\x80\x84", "\xE2\x80\x85", "\xE2\x80\x86",
    "\xE2\x80\x87", "\xE2\x80\x88", "\xE2\x80\x89", "\xE2\x80\x8A", "\xE2\x80\xA8",
    "\xE2\x80\xA9", "\xE2\x80\xAF", "\xE2\x81\x9F", "\xE3\x80\x80"};

// Bytes of the white-space character at the start (or the end) of the text, 0 if there is none.
size_t leading_space(std::string_view text) {
  for (const std::string_view space : kWhiteSpace) {
    if (text.starts_with(space)) {
      return space.size();
    }
  }
  return 0;
}

size_t trailing_space(std::string_view text) {
  for (const std::string_view space : kWhiteSpace) {
    if (text.ends_with(space)) {
      return space.size();
    }
  }
  return 0;
}

std::string turn(std::string_view role, std::string_view prefix, std::string_view content) {
  return fmt::format("{}{}\n{}{}{}\n", kStart, role, prefix, strip(content), kEnd);
}

void check_role(const ChatMessage& message, size_t index, bool user_expected) {
  const std::string& role = message.role;
  check(role == "user" || role == "assistant" || role == "model" || role == "system",
        "[chat] message {}: expected the role user, assistant, model or system, got {:?}",
        index,
        role);
  check((role == "user") == user_expected,
        "[chat] message {}: roles must alternate, user first: expected {}, got {}",
        index,
        user_expected ? "user" : "assistant",
        role);
}

}  // namespace

std::string_view strip(std::string_view text) {
  for (size_t bytes = leading_space(text); bytes > 0; bytes = leading_space(text)) {
    text.remove_prefix(bytes);
  }
  for (size_t bytes = trailing_space(text); bytes > 0; bytes = trailing_space(text)) {
    text.remove_suffix(bytes);
  }
  return text;
}

std::string render_chat(const std::vector<ChatMessage>& messages, bool add_generation_prompt) {
  check(!messages.empty(), "[chat] expected at least one message, got none");
  const size_t first = messages[0].role == "system" ? 1 : 0;
  std::string text = "<bos>";
  for (size_t i = first; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    check_role(message, i, /*user_expected=*/(i - first) % 2 == 0);
    const std::string prefix = i == 1 && first == 1 ? messages[0].content + "\n\n" : "";
    text += turn(message.role == "assistant" ? "model" : message.role, prefix, message.content);
  }
  if (add_generation_prompt) {
    text += kReplyPrompt;
  }
  return text;
}

std::string render_user_turn(std::string_view content, bool reply_closed) {
  return fmt::format("{}\n{}{}", reply_closed ? "" : kEnd, turn("user", "", content), kReplyPrompt);
}

}  // namespace gemma_torch
