#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace gemma_torch {

struct ChatMessage {
  std::string role = {};     // "user", "assistant" (also "model"), "system"
  std::string content = {};  // UTF-8
};

/// Without the white space at both ends that Python's str.strip removes, in all of Unicode.
std::string_view strip(std::string_view text);

/// The conversation as Gemma 3's chat template writes it, `<bos>` included: encode it with add_bos
/// = false. A system message may come first; it stands, as written, before the first user message.
/// Other contents are stripped. Special strings in a content are not escaped, as in the template.
/// Throws: Error if there are no messages, a role is unknown, or user and assistant do not
/// alternate, user first (where the assistant would be, the template lets a later system message
/// stand). Source: tokenizer_config.json, `chat_template`.
std::string render_chat(const std::vector<ChatMessage>& messages, bool add_generation_prompt);

/// What a next user message appends to a conversation whose ids are already in a cache, up to and
/// with the prompt for the reply. `reply_closed` says whether the last reply ended with
/// `<end_of_turn>`; one cut off by its length is closed first. Encode with add_bos = false: a
/// special string begins the text or a newline run does, and no piece joins either with what came
/// before.
std::string render_user_turn(std::string_view content, bool reply_closed);

}  // namespace gemma_torch
