#include <fmt/format.h>

#include <algorithm>
#include <csignal>
#include <exception>
#include <string>
#include <vector>

#include "common.h"
#include "launch.h"

namespace {

using namespace gemma_torch::apps;

constexpr void (*kCommands[])(CLI::App&) = {
    add_generate, add_chat,    add_tokenize, add_detokenize, add_logits,    add_perplexity,
    add_info,     add_convert, add_quantize, add_trace,      add_bench,     add_parity,
    add_capture,  add_patch,   add_lens,     add_attention,  add_attribute, add_saliency,
    add_steer,    add_sae,     add_score,    add_kl,         add_surprisal, add_embed,
    add_finetune, add_merge,   add_eval,
};

// Spellings that CLI11 misreads: "--prompt=" is an empty prompt, not the next word; and llama-bench's
// -pg and -ub have two letters after one dash, which would be -p g.
std::vector<std::string> arguments(int argc, char** argv) {
  std::vector<std::string> words;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--prompt=" || word == "--ids=" || word == "--delimiter=") {
      words.push_back(word.substr(0, word.size() - 1));
      words.emplace_back();
    } else {
      const bool two_letters = i > 1 && words[0] == "bench" && (word == "-pg" || word == "-ub");
      words.push_back(two_letters ? "-" + word : word);
    }
  }
  std::reverse(words.begin(), words.end());  // CLI11 takes a vector from its end
  return words;
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);  // a closed pipe is seen by print_text
  CLI::App app{"Gemma 3 270M in C++ on LibTorch. `gemma COMMAND --help` lists a command's flags."};
  app.name("gemma");
  app.set_version_flag("--version", "gemma " GEMMA_TORCH_VERSION);
  app.require_subcommand(1);
  for (const auto add : kCommands) {
    add(app);
  }
  try {
    app.parse(arguments(argc, argv));
    leave_ranks();
    return 0;
  } catch (const CLI::Success& done) {
    return app.exit(done);
  } catch (const CLI::ParseError& wrong) {
    return report(fmt::format("[usage] {} Hint: gemma --help", describe(wrong)), 2);
  } catch (const std::exception& error) {
    return report(describe(error), 1);
  }
}
