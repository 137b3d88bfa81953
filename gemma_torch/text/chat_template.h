#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace gemma_torch {

class Tokenizer;

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

/// A stretch of a rendered chat: the template's own (special strings, newlines), or a role and what
/// it said.
struct ChatPart {
  std::string text = {};
  bool frame = false;
};

/// What render_chat and render_user_turn give, in stretches. Throws: as render_chat.
std::vector<ChatPart> chat_parts(const std::vector<ChatMessage>& messages,
                                 bool add_generation_prompt);
std::vector<ChatPart> user_turn_parts(std::string_view content, bool reply_closed);

/// The ids of a rendered chat in which a special string in a message is plain text: nobody ends a
/// turn by writing "<end_of_turn>". Where no message holds one, they are those of the whole text.
/// Throws: Error for text that is not UTF-8.
std::vector<int64_t> encode_parts(const Tokenizer& tokenizer, const std::vector<ChatPart>& parts);

}  // namespace gemma_torch
