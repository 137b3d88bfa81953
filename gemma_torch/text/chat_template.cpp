#include "gemma_torch/text/chat_template.h"

#include <array>

#include "gemma_torch/base/error.h"
#include "gemma_torch/text/tokenizer.h"

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

// Frame stretches that meet become one, so that a newline and what follows it are encoded together.
void add_frame(std::vector<ChatPart>& parts, std::string_view text) {
  if (parts.empty() || !parts.back().frame) {
    parts.push_back({"", /*frame=*/true});
  }
  parts.back().text += text;
}

// The role's own line goes with the content: newlines at the begin of a system text join its own.
void add_turn(std::vector<ChatPart>& parts, std::string_view role, std::string_view content) {
  add_frame(parts, kStart);
  parts.push_back({fmt::format("{}\n{}", role, content), /*frame=*/false});
  add_frame(parts, kEnd);
  add_frame(parts, "\n");
}

std::string joined(const std::vector<ChatPart>& parts) {
  std::string text;
  for (const ChatPart& part : parts) {
    text += part.text;
  }
  return text;
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

std::vector<ChatPart> chat_parts(const std::vector<ChatMessage>& messages,
                                 bool add_generation_prompt) {
  check(!messages.empty(), "[chat] expected at least one message, got none");
  const size_t first = messages[0].role == "system" ? 1 : 0;
  std::vector<ChatPart> parts;
  add_frame(parts, "<bos>");
  for (size_t i = first; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    check_role(message, i, /*user_expected=*/(i - first) % 2 == 0);
    const std::string prefix = i == 1 && first == 1 ? messages[0].content + "\n\n" : "";
    add_turn(parts,
             message.role == "assistant" ? "model" : message.role,
             prefix + std::string(strip(message.content)));
  }
  if (add_generation_prompt) {
    add_frame(parts, kReplyPrompt);
  }
  return parts;
}

std::vector<ChatPart> user_turn_parts(std::string_view content, bool reply_closed) {
  std::vector<ChatPart> parts;
  add_frame(parts, reply_closed ? "" : kEnd);
  add_frame(parts, "\n");
  add_turn(parts, "user", strip(content));
  add_frame(parts, kReplyPrompt);
  return parts;
}

std::string render_chat(const std::vector<ChatMessage>& messages, bool add_generation_prompt) {
  return joined(chat_parts(messages, add_generation_prompt));
}

std::string render_user_turn(std::string_view content, bool reply_closed) {
  return joined(user_turn_parts(content, reply_closed));
}

std::vector<int64_t> encode_parts(const Tokenizer& tokenizer, const std::vector<ChatPart>& parts) {
  std::vector<int64_t> ids;
  for (const ChatPart& part : parts) {
    const auto more = tokenizer.encode(part.text, {.add_bos = false, .parse_special = part.frame});
    ids.insert(ids.end(), more.begin(), more.end());
  }
  return ids;
}

}  // namespace gemma_torch
