#include "common.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>

#include "adapters.h"
#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"

namespace gemma_torch::apps {
namespace {

std::atomic<bool> interrupt_seen{false};

extern "C" void on_interrupt(int) {
  if (interrupt_seen.exchange(true)) {
    std::_Exit(130);  // what a shell reports for a program ended by Ctrl-C
  }
}

std::string cache_folder() {
  const auto from = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
  if (const auto own = from("GEMMA_TORCH_CACHE"); !own.empty()) {
    return own;
  }
  if (const auto xdg = from("XDG_CACHE_HOME"); !xdg.empty()) {
    return xdg + "/gemma_torch";
  }
  return from("HOME") + "/.cache/gemma_torch";
}

void check_quant(const std::string& name) {
  check(name == "auto" || name == "none" || find_recipe(name).has_value(),
        "[quant] expected auto, none, or one of {}, got {}",
        recipe_names(),
        name);
}

// What of --quant is still to be done to a model that was loaded.
OnTheFly on_the_fly(const std::string& asked, const Pretrained& loaded, const std::string& path) {
  if (asked == "auto") {
    return OnTheFly::kNone;
  }
  if (!loaded.formats.empty()) {
    const auto name = recipe_name(loaded.formats);
    check(asked == name, "[quant] expected auto or {}, which {} holds, got {}", name, path, asked);
    return OnTheFly::kNone;
  }
  const auto recipe = find_recipe(asked);
  check(!recipe || !recipe->calibrated,
        "[quant] {}: expected a folder that holds it, got {}. Hint: gemma quantize --quant {} "
        "--model {} --out FOLDER",
        asked,
        path,
        asked,
        path);
  return recipe ? OnTheFly::kInt8 : OnTheFly::kNone;
}

std::optional<kernels::Isa> parse_isa(const std::string& name) {
  if (name == "auto") {
    return {};
  }
  std::string usable;
  for (const auto isa : kernels::usable_isas()) {
    if (name == kernels::isa_name(isa)) {
      return isa;
    }
    usable += fmt::format(", {}", kernels::isa_name(isa));
  }
  fail("[isa] expected one that this CPU has, auto{}, got {}", usable, name);
}

// What every command says of loading a model that it runs.
void add_loading_flags(CLI::App& command, ModelOptions& options) {
  add_model_flag(command, options.model);
  command.add_option("--device", options.device, "auto, cpu, cuda or mps")->capture_default_str();
  command.add_option("--dtype", options.dtype, "auto (the checkpoint's), float32 or bfloat16")
      ->capture_default_str();
  add_adapter_flag(command, options.lora);
}

}  // namespace

void add_model_flag(CLI::App& command, std::string& model) {
  command.add_option("-m,--model", model, "HF folder or .gguf file [the fetched Gemma 3 270M]");
}

void add_model_flags(CLI::App& command, ModelOptions& options) {
  add_loading_flags(command, options);
  command
      .add_option(
          "--engine",
          options.engine,
          "auto (fused where it can run the model, else eager), eager, fused (CPU kernels), "
          "traced (TorchScript) or graph (captured CUDA graphs)")
      ->capture_default_str();
  command
      .add_option(
          "--quant",
          options.quant,
          "auto (what the folder holds), none, int8 (bfloat16 layers rounded on loading), or "
          "what `gemma quantize` made the folder with")
      ->capture_default_str();
  command
      .add_option(
          "--kv", options.kv, "dtype of keys and values: auto (the weights'), float32 or bfloat16")
      ->capture_default_str();
  command
      .add_option("--isa",
                  options.isa,
                  "instruction set of the fused engine: auto (the widest), or a narrower one of "
                  "generic, neon, avx2, avx512, amx")
      ->capture_default_str();
  command
      .add_option("--products",
                  options.products,
                  "products of many tokens in the fused engine: auto (the faster), float32 or "
                  "bfloat16")
      ->capture_default_str();
  command.add_option("--traced-file",
                     options.traced_file,
                     "what `gemma trace` made of the model, for --engine traced [traced anew]");
  command
      .add_option("--launch-steps",
                  options.launch_steps,
                  "tokens that --engine graph makes between two readings by the host")
      ->capture_default_str();
  command.add_flag("--no-cache",
                   options.no_cache,
                   "each token runs the whole sequence, as in the plain notebook");
  command.add_option("--ctx", options.ctx, "tokens the cache holds [what the command needs]");
  command.add_option("-t,--threads", options.threads, "[usable physical cores]");
}

void add_module_flags(CLI::App& command, ModelOptions& options) {
  add_loading_flags(command, options);
  command.add_option("--engine", options.engine, "auto or eager: only modules have sites")
      ->capture_default_str();
  command.add_option("-t,--threads", options.threads, "[usable physical cores]");
}

void add_text_flags(CLI::App& command, TextOptions& options) {
  // CLI11 reads "" into an optional as nothing given: these callbacks do not.
  const auto text = [&](const char* name, std::optional<std::string>& target, const char* help) {
    command.add_option_function<std::string>(
        name, [&target](const std::string& value) { target = value; }, help);
  };
  text("-p,--prompt", options.prompt, "text [standard input]");
  text("-f,--file", options.file, "file with the text");
  text("--ids", options.ids, "token ids instead of text, 2,818,5279: used as given, no BOS added");
}

std::string model_path(const std::string& given) {
  return given.empty() ? cache_folder() + "/gemma-3-270m" : given;
}

namespace {

Pretrained load(const ModelOptions& options, bool packed) {
  check_quant(options.quant);
  parse_isa(options.isa);
  check(options.threads >= 0, "[threads] expected at least 1, got {}", options.threads);
  parse_engine(options.engine);
  at::set_num_threads(options.threads > 0 ? options.threads : usable_cores());
  LoadOptions how;
  how.device = parse_device(options.device);
  if (options.dtype != "auto") {
    how.dtype = parse_dtype(options.dtype, c10::kBFloat16);
  }
  // The fused engine packs the weights: it needs no copy of them besides.
  const bool copied = options.engine != "auto" && options.engine != "fused";
  how.mapped = !copied && how.device.is_cpu() && options.dtype != "float32";
  if (packed && !copied && options.lora.empty()) {  // an adapter would change the weights
    how.pack_threads = at::get_num_threads();
    how.pack_format =
        options.quant == "int8" ? kernels::Format::kInt8 : kernels::Format::kLossless12;
  }
  auto loaded = load_pretrained(model_path(options.model), how);
  add_adapters(loaded.model, options.lora, /*merged=*/options.engine != "eager");
  return loaded;
}

}  // namespace

Pretrained load(const ModelOptions& options) {
  return load(options, /*packed=*/false);
}

Pretrained load_to_run(const ModelOptions& options) {
  return load(options, /*packed=*/true);
}

Pretrained load_modules(const char* command, ModelOptions options) {
  check(options.engine == "auto" || options.engine == "eager",
        "[{}] --engine: expected auto or eager, whose modules alone have sites, got {}",
        command,
        options.engine);
  options.engine = "eager";  // whose weights are copied: they are used as they lie
  return load(options);
}

EngineOptions engine_options(const Pretrained& loaded,
                             const ModelOptions& options,
                             int64_t capacity,
                             int64_t batch) {
  EngineOptions how{.kind = parse_engine(options.engine), .capacity = capacity, .batch = batch};
  if (options.kv != "auto") {
    how.kv_dtype = parse_dtype(options.kv, c10::kBFloat16);
  }
  how.fused.quant = on_the_fly(options.quant, loaded, model_path(options.model));
  how.fused.isa = parse_isa(options.isa);
  how.fused.pack = loaded.pack;
  how.traced_file = options.traced_file;
  how.launch_steps = options.launch_steps;
  how.cached = !options.no_cache;
  if (options.products != "auto") {
    how.fused.products = parse_dtype(options.products, c10::kBFloat16);
  }
  return how;
}

std::unique_ptr<Engine> make_engine(const Pretrained& loaded,
                                    const ModelOptions& options,
                                    int64_t needed,
                                    int64_t batch) {
  check(options.ctx >= 0, "[ctx] expected at least 1, got {}", options.ctx);
  check(options.ctx == 0 || needed <= options.ctx,
        "[ctx] expected at least {} for the prompt and the new tokens, got {}",
        needed,
        options.ctx);
  const auto capacity = options.ctx > 0 ? options.ctx : needed;
  return gemma_torch::make_engine(loaded.model, engine_options(loaded, options, capacity, batch));
}

std::string read_text(const TextOptions& options) {
  check(!options.prompt || !options.file, "[text] expected one of --prompt and --file, got both");
  if (options.file) {
    return read_file(*options.file);
  }
  if (options.prompt) {
    return *options.prompt;
  }
  if (is_terminal(STDIN_FILENO)) {
    fmt::print(stderr, "gemma: reading the text from the terminal, Ctrl-D ends it\n");
  }
  return {std::istreambuf_iterator<char>(std::cin), {}};
}

std::vector<int64_t> parse_ids(const std::string& list) {
  std::vector<int64_t> ids;
  size_t start = 0;
  while (start <= list.size()) {
    const auto end = std::min(list.find(',', start), list.size());
    const auto word = list.substr(start, end - start);
    const bool digits = !word.empty() && word.size() < 10 &&
                        word.find_first_not_of("0123456789") == std::string::npos;
    check(digits, "[ids] expected token ids such as 2,818,5279, got \"{}\"", word);
    ids.push_back(std::stoll(word));
    start = end + 1;
  }
  return ids;
}

std::vector<int64_t> read_ids(const TextOptions& options,
                              const std::optional<Tokenizer>& tokenizer,
                              EncodeOptions encode) {
  if (options.ids) {
    check(!options.prompt && !options.file, "[text] expected --ids or text, got both");
    return parse_ids(*options.ids);
  }
  check(tokenizer.has_value(),
        "[text] this model has no tokenizer.model or tokenizer.json. Hint: --ids 2,818,5279");
  return tokenizer->encode(read_text(options), encode);
}

nlohmann::json piece_json(int64_t id, const std::optional<Tokenizer>& tokenizer) {
  return tokenizer ? nlohmann::json(tokenizer->piece(id)) : nlohmann::json();
}

nlohmann::json pieces_json(const std::vector<int64_t>& ids,
                           const std::optional<Tokenizer>& tokenizer) {
  if (!tokenizer) {
    return {};
  }
  auto pieces = nlohmann::json::array();
  for (const auto id : ids) {
    pieces.push_back(tokenizer->piece(id));
  }
  return pieces;
}

bool is_terminal(int descriptor) {
  return ::isatty(descriptor) == 1;
}

void Progress::show(int64_t done, int64_t total) {
  const auto elapsed = std::chrono::steady_clock::now() - start_;
  if (is_terminal(STDERR_FILENO) && elapsed > std::chrono::seconds(2)) {
    fmt::print(stderr, "\r{} {} of {}", what_, done, total);
    shown_ = true;
  }
}

Progress::~Progress() {
  if (shown_) {
    fmt::print(stderr, "\r\x1b[K");  // clears the line
  }
}

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const auto colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) {
      return line.substr(colon + 2);
    }
  }
  return "unknown CPU";
}

void print_json(const nlohmann::json& json) {
  print_text(json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

void print_text(const std::string& text) {
  errno = 0;
  std::fwrite(text.data(), 1, text.size(), stdout);
  if (std::fflush(stdout) != 0) {
    if (errno == EPIPE) {
      std::_Exit(0);  // the reader closed the pipe: it has what it wanted
    }
    fail("[output] writing to standard output: {}", std::strerror(errno));
  }
}

bool interrupted() {
  return interrupt_seen;
}
void clear_interrupt() {
  interrupt_seen = false;
}

void catch_interrupt() {
  struct sigaction action = {};
  action.sa_handler = on_interrupt;
  ::sigaction(SIGINT, &action, nullptr);
}

}  // namespace gemma_torch::apps
