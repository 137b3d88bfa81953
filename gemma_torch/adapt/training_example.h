#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace gemma_torch {

class Tokenizer;

/// A sequence to learn from.
struct Example {
  std::vector<int64_t> ids = {};
  std::vector<bool> is_target = {};  // [t]: ids[t] is to be predicted from those before; never [0]
  bool truncated = false;            // the line held more than max_tokens
};

struct ExampleOptions {
  int64_t max_tokens = 512;      // what is past them is cut off, at the end
  int64_t vocab_size = 262'144;  // ids at or past it are refused, those of the tokenizer too
  bool all_tokens = false;       // prompts and users' turns are targets too
};

/// One line of training data, a JSON object with the fields of one kind; "meta" is ignored.
///
///   {"text": ".."}                         <bos> text <eos>; targets: all after <bos>
///   {"prompt": "..", "completion": ".."}   <bos> prompt completion <eos>; targets: the last two
///   {"messages": [{"role": "user", "content": ".."}, ..]}
///                                          the ids of encode_parts() for the whole chat; targets:
///                                          each reply of the assistant and its <end_of_turn>
///   {"ids": [..]}                          as they are; targets: all after the first
///   {"prompt_ids": [..], "completion_ids": [..]}   as they are; targets: completion_ids
///
/// Prompt and completion are encoded one by one, so that the ids learnt are those that follow the
/// prompt of `gemma generate -p`; no piece joins the two. Special strings count as in that prompt,
/// but in messages they are plain text. `tokenizer` may be null for lines of ids. `place`, such as
/// "path:line", is named in errors.
///
/// Throws: Error, one line `[training_data] place: field: expected .., got ..`, for anything else:
/// bad JSON, a key given twice, bytes that are not UTF-8, a byte order mark, NUL bytes, an unknown
/// or missing field, two kinds in a line, a wrong type, an empty text or list, a text that begins
/// with the <bos> that is added, an id outside the vocabulary, a chat the template refuses or whose
/// last message is not the assistant's.
Example parse_example(std::string_view line,
                      const std::string& place,
                      const Tokenizer* tokenizer,
                      const ExampleOptions& options = {});

}  // namespace gemma_torch
