#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <csignal>
#include <exception>
#include <string>

#include "common.h"
#include "gemma_torch/base/error.h"

namespace {

constexpr void (*kCommands[])(CLI::App&) = {gemma_torch::apps::add_generate,
//TMP                                             gemma_torch::apps::add_chat,
//TMP                                             gemma_torch::apps::add_tokenize,
//TMP                                             gemma_torch::apps::add_detokenize,
//TMP                                             gemma_torch::apps::add_logits,
//TMP                                             gemma_torch::apps::add_perplexity,
//TMP                                             gemma_torch::apps::add_info,
                                            gemma_torch::apps::add_convert,
//TMP                                             gemma_torch::apps::add_bench,
};

int report(std::string message) {
  for (auto& c : message) {
    c = c == '\n' ? ' ' : c;   // one line, whatever a library says
  }
  fmt::print(stderr, "gemma: error: {}\n", message);
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);   // a closed pipe is seen by print_text
  CLI::App app{"Gemma 3 270M in C++ on LibTorch. `gemma COMMAND --help` lists a command's flags."};
  app.name("gemma");
  app.set_version_flag("--version", "gemma " GEMMA_TORCH_VERSION);
  app.require_subcommand(1);
  for (const auto add : kCommands) {
    add(app);
  }
  try {
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::Success& done) {
    return app.exit(done);
  } catch (const CLI::ParseError& wrong) {
    fmt::print(stderr, "gemma: error: [usage] {} Hint: gemma --help\n", wrong.what());
    return 2;
  } catch (const gemma_torch::Error& error) {
    return report(error.what());
  } catch (const c10::Error& error) {
    return report(fmt::format("[torch] {}", error.what_without_backtrace()));
  } catch (const std::bad_alloc&) {
    return report("[memory] not enough of it");
  } catch (const std::exception& error) {
    return report(error.what());
  }
}
