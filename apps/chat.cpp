#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <iostream>

#include "common.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/generate/generate.h"
#include "gemma_torch/text/chat_template.h"
#include "gemma_torch/text/stream_decoder.h"
#include "sampling_flags.h"

namespace gemma_torch::apps {
namespace {

struct ChatFlags {
  ModelOptions model;
  SamplingFlags sampling;
  std::string system;
  int64_t max_new_tokens = 1024;
  bool verbose = false;
};

// A conversation on one cache. Every turn encodes and appends its own text only.
class Chat {
 public:
  Chat(const Pretrained& loaded, Engine& engine, const ChatFlags& flags)
      : loaded_(loaded),
        engine_(engine),
        flags_(flags),
        session_(engine),
        sampling_(flags.sampling.resolve(loaded.sampling)) {}

  // False when the cache is full.
  bool turn(const std::string& message) {
    std::vector<int64_t> ids;
    try {
      ids = encode_parts(*loaded_.tokenizer, parts(message));
    } catch (const Error& error) {
      fmt::print(stderr, "gemma: this message was not sent: {}\n", error.what());
      return true;
    }
    const auto size = static_cast<int64_t>(ids.size());
    // The last token of a reply waits for the next turn, so one more than the room can be chosen.
    const auto fits = session_.room() - size + 1;
    if (fits < 1) {
      fmt::print(stderr,
                 "gemma: this message was not sent: it is {} tokens long, the cache of {} has room "
                 "for {}. "
                 "Hint: --ctx\n",
                 size,
                 engine_.capacity(),
                 std::max<int64_t>(0, session_.room()));
      return session_.room() > 0;
    }
    const auto reply = answer(ids, std::min(fits, flags_.max_new_tokens));
    const bool full = reply.finish == FinishReason::kLength && fits <= flags_.max_new_tokens;
    if (full) {
      fmt::print(
          stderr, "gemma: the cache of {} tokens is full. Hint: --ctx\n", engine_.capacity());
    } else if (reply.finish == FinishReason::kLength) {
      fmt::print(stderr, "gemma: the reply was cut after {} tokens. Hint: -n\n", reply.ids.size());
    }
    return !full;
  }

  void summary() const {
    fmt::print(stderr,
               "{} turns: {} tokens prefilled, {} new, position {}; seed {}\n",
               turns_,
               prefilled_,
               new_,
               engine_.position(),
               sampling_.seed);
  }

 private:
  std::vector<ChatPart> parts(const std::string& message) const {
    if (turns_ > 0) {
      return user_turn_parts(message, closed_);
    }
    std::vector<ChatMessage> first;
    if (!flags_.system.empty()) {
      first.push_back({"system", flags_.system});
    }
    first.push_back({"user", message});
    return chat_parts(first, /*add_generation_prompt=*/true);
  }

  Generation answer(const std::vector<int64_t>& ids, int64_t max_new_tokens) {
    auto sampling = sampling_;
    sampling.seed += static_cast<uint64_t>(turns_);  // another stream for each reply
    const GenerateOptions options{
        .max_new_tokens = max_new_tokens, .sampling = sampling, .stop_ids = loaded_.stop_ids};
    StreamDecoder decoder(*loaded_.tokenizer, /*skip_special=*/true);
    clear_interrupt();
    const auto result = session_.turn(ids, options, [&](int64_t, int64_t id) {
      print_text(decoder.push(id));
      return !interrupted();
    });
    print_text(decoder.flush() + "\n");
    clear_interrupt();
    const auto& reply = result.rows[0];
    closed_ = reply.ids.back() == loaded_.tokenizer->end_of_turn_id();
    count(result);
    return reply;
  }

  void count(const GenerateResult& result) {
    const auto chosen = static_cast<int64_t>(result.rows[0].ids.size());
    ++turns_;
    prefilled_ += result.prompt_tokens;
    new_ += chosen;
    if (flags_.verbose) {
      fmt::print(stderr,
                 "turn {}: {} tokens prefilled, {} new, position {}\n",
                 turns_,
                 result.prompt_tokens,
                 chosen,
                 engine_.position());
    }
  }

  const Pretrained& loaded_;
  Engine& engine_;
  const ChatFlags& flags_;
  Session session_;
  Sampling sampling_;
  bool closed_ = true;  // the last reply ended its turn itself
  int64_t turns_ = 0, prefilled_ = 0, new_ = 0;
};

// The next line; false at the end of the input. Ctrl-C while waiting only starts the line anew.
bool read_line(std::string& line, bool prompting) {
  while (true) {
    if (prompting) {
      fmt::print(stderr, "> ");
    }
    if (std::getline(std::cin, line)) {
      return true;
    }
    if (!interrupted()) {
      return false;
    }
    clear_interrupt();
    std::cin.clear();
    std::clearerr(stdin);
    fmt::print(stderr, "\n(Ctrl-D ends the chat)\n");
  }
}

void run_chat(const ChatFlags& flags) {
  check(flags.max_new_tokens >= 1,
        "[chat] --max-new-tokens: expected at least 1, got {}",
        flags.max_new_tokens);
  const auto loaded = load_to_run(flags.model);
  check(loaded.tokenizer.has_value(),
        "[chat] {} has no tokenizer.model or tokenizer.json. Hint: gemma generate --ids",
        model_path(flags.model.model));
  if (!loaded.instruct) {
    fmt::print(stderr,
               "gemma: this is a base model, which continues text and was not trained to chat. "
               "Hint: -m with an instruct model, such as google/gemma-3-270m-it\n");
  }
  const auto engine = make_engine(loaded, flags.model, /*needed=*/1);
  Chat chat(loaded, *engine, flags);
  catch_interrupt();
  const bool prompting = is_terminal(STDIN_FILENO) && is_terminal(STDERR_FILENO);
  std::string line;
  bool going = true;
  while (going && read_line(line, prompting)) {
    if (!strip(line).empty()) {
      going = chat.turn(line);
    }
  }
  chat.summary();
}

}  // namespace

void add_chat(CLI::App& app) {
  auto* command =
      app.add_subcommand("chat", "talk: one line a message; Ctrl-C ends a reply, Ctrl-D the chat");
  auto flags = std::make_shared<ChatFlags>();
  flags->model.ctx = 4096;
  add_model_flags(*command, flags->model);
  command->get_option("--ctx")->capture_default_str();
  command->add_option("--system", flags->system, "what the model is told before the first message");
  command->add_option("-n,--max-new-tokens", flags->max_new_tokens, "tokens of a reply at most")
      ->capture_default_str();
  add_sampling_flags(*command, flags->sampling);
  command->add_flag("--verbose", flags->verbose, "counts of tokens after each reply");
  command->callback([flags] { run_chat(*flags); });
}

}  // namespace gemma_torch::apps
