#pragma once

#include <CLI/CLI.hpp>
#include <chrono>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "gemma_torch/engine/engine.h"
#include "gemma_torch/pretrained.h"

namespace gemma_torch::apps {

/// The flags that every command which runs a model has.
struct ModelOptions {
  std::string model = {};              // HF folder or .gguf; empty: the fetched one
  std::vector<std::string> lora = {};  // adapters' folders, DIR or DIR=SCALE
  std::string device = "auto";
  std::string dtype = "auto";
  std::string engine = "auto";
  std::string quant = "auto";
  std::string kv = "auto";
  std::string isa = "auto";
  std::string products = "auto";
  std::string traced_file = {};  // empty: the traced engine traces the model
  int64_t launch_steps = 8;      // of the graph engine
  bool no_cache = false;
  int64_t ctx = 0;  // 0: what the command needs
  int threads = 0;  // 0: usable physical cores
};

/// Where a command's text comes from. An empty text that was given is not an absent one.
struct TextOptions {
  std::optional<std::string> prompt = {};
  std::optional<std::string> file = {};
  std::optional<std::string> ids = {};  // "2,818,5279"
};

void add_model_flag(CLI::App& command, std::string& model);
void add_model_flags(CLI::App& command, ModelOptions& options);
void add_text_flags(CLI::App& command, TextOptions& options);
/// The same for a command that runs the modules themselves, which alone have sites.
void add_module_flags(CLI::App& command, ModelOptions& options);
/// Throws: Error if another engine than eager is asked for, in the name of the command.
Pretrained load_modules(const char* command, ModelOptions options);

/// The folder of the default model: gemma-3-270m in $GEMMA_TORCH_CACHE,
/// $XDG_CACHE_HOME/gemma_torch or ~/.cache/gemma_torch. `given` if that is not empty.
std::string model_path(const std::string& given);

/// Sets threads, then loads on the device and in the dtype asked for.
Pretrained load(const ModelOptions& options);

/// The same for a command that goes on to make_engine with these options: packs the weights meanwhile, where the
/// fused engine is to run them.
Pretrained load_to_run(const ModelOptions& options);

/// What the flags say of an engine for `capacity` tokens a row.
EngineOptions engine_options(const Pretrained& loaded,
                             const ModelOptions& options,
                             int64_t capacity,
                             int64_t batch);

/// An engine of the kind asked for that holds `needed` tokens a row, or --ctx where that is given.
/// Throws: Error if --ctx is less than needed; before any work.
std::unique_ptr<Engine> make_engine(const Pretrained& loaded,
                                    const ModelOptions& options,
                                    int64_t needed,
                                    int64_t batch = 1);

/// The text of -p, of -f, or of standard input. Throws: Error if two of them are given.
std::string read_text(const TextOptions& options);

/// The token ids of --ids as given, else of the text.
/// Throws: Error for a bad id, or for text where the model has no tokenizer.
std::vector<int64_t> read_ids(const TextOptions& options,
                              const std::optional<Tokenizer>& tokenizer,
                              EncodeOptions encode = {});
std::vector<int64_t> parse_ids(const std::string& list);

/// The pieces of ids; null where the model has no tokenizer.
nlohmann::json pieces_json(const std::vector<int64_t>& ids,
                           const std::optional<Tokenizer>& tokenizer);
nlohmann::json piece_json(int64_t id, const std::optional<Tokenizer>& tokenizer);

/// Whether a descriptor is a terminal: colour and progress go only there.
bool is_terminal(int descriptor);

/// "what 512 of 2048", kept up to date on a terminal's standard error once the work has taken two
/// seconds.
class Progress {
 public:
  explicit Progress(std::string what) : what_(std::move(what)) {}
  ~Progress();  // removes the line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  void show(int64_t done, int64_t total);

 private:
  std::string what_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  bool shown_ = false;
};

/// The processor's own name, for reports; "unknown CPU" where the system does not tell.
std::string cpu_name();

/// Prints one JSON object on standard output. Bytes that are not UTF-8 become U+FFFD.
void print_json(const nlohmann::json& object);

/// Writes text to standard output at once. A reader that is gone ends the program quietly.
/// Throws: Error if it cannot be written for another reason, such as a full disk.
void print_text(const std::string& text);

/// Set by Ctrl-C once catch_interrupt() was called; a second Ctrl-C ends the program.
bool interrupted();
void catch_interrupt();
void clear_interrupt();

// One for each subcommand, in the file of its name.
void add_generate(CLI::App& app);
void add_chat(CLI::App& app);
void add_tokenize(CLI::App& app);
void add_detokenize(CLI::App& app);
void add_logits(CLI::App& app);
void add_perplexity(CLI::App& app);
void add_info(CLI::App& app);
void add_convert(CLI::App& app);
void add_quantize(CLI::App& app);
void add_trace(CLI::App& app);
void add_bench(CLI::App& app);
void add_parity(CLI::App& app);
void add_capture(CLI::App& app);
void add_patch(CLI::App& app);
void add_lens(CLI::App& app);
void add_attention(CLI::App& app);
void add_attribute(CLI::App& app);
void add_saliency(CLI::App& app);
void add_steer(CLI::App& app);
void add_sae(CLI::App& app);
void add_score(CLI::App& app);
void add_kl(CLI::App& app);
void add_surprisal(CLI::App& app);
void add_embed(CLI::App& app);
void add_finetune(CLI::App& app);
void add_merge(CLI::App& app);
void add_eval(CLI::App& app);

}  // namespace gemma_torch::apps
