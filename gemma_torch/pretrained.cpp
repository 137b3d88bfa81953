#include "gemma_torch/pretrained.h"

#include <algorithm>
#include <filesystem>
#include <functional>
#include <future>
#include <nlohmann/json.hpp>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/io/gguf.h"
#include "gemma_torch/io/gguf_model.h"
#include "gemma_torch/io/hf_folder.h"
#include "gemma_torch/io/safetensors.h"
#include "gemma_torch/quant/pack.h"
#include "gemma_torch/quant/quantize.h"
#include "gemma_torch/text/model_proto.h"
#include "gemma_torch/text/tokenizer_json.h"

namespace gemma_torch {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int64_t kEndOfTurn = 106;

std::optional<Vocabulary> folder_vocabulary(const std::string& folder) {
  if (fs::exists(folder + "/tokenizer.model")) {
    return read_tokenizer_model(folder + "/tokenizer.model");
  }
  if (fs::exists(folder + "/tokenizer.json")) {
    return read_tokenizer_json(folder + "/tokenizer.json");
  }
  return std::nullopt;
}

void check_exists(const std::string& path) {
  check(fs::exists(path),
        "[load_pretrained] {}: no such file or folder. Hint: an HF folder or a .gguf file (-m), or "
        "`bash cmake/run.sh`, which fetches the default weights",
        path);
}

json folder_config(const std::string& folder) {
  auto config = read_json(folder, "config.json");
  check(!config.is_null(), "[load_pretrained] {}: expected config.json, found none", folder);
  return config;
}

// What write_quantized puts into config.json; other libraries refuse the name.
constexpr const char* kQuantMethod = "gemma_torch";
// Of cells and scan: counted up when kernels/cpu/packed.h or head_scan.h change theirs.
constexpr int kLayout = 5;

// Takes quantization_config out of the config.
Formats take_formats(json& config, const std::string& folder) {
  const auto at = config.find("quantization_config");
  if (at == config.end() || at->is_null()) {
    return {};
  }
  const auto quant = *at;
  config.erase(at);
  const auto method = quant.is_object() ? quant.value("quant_method", json()) : json();
  check(method == kQuantMethod,
        "[load_pretrained] {}: quantization_config.quant_method: expected {}, got {}. Hint: the "
        "folder in bfloat16, then gemma quantize",
        folder,
        kQuantMethod,
        method.dump());
  const auto layout = quant.value("layout", json());
  check(layout == kLayout,
        "[load_pretrained] {}: quantization_config.layout: expected {}, got {}. Hint: make the "
        "folder anew with gemma quantize",
        folder,
        kLayout,
        layout.dump());
  return formats_from_json(quant.value("formats", json()));
}

void add_once(std::vector<int64_t>& ids, int64_t id) {
  if (std::find(ids.begin(), ids.end(), id) == ids.end()) {
    ids.push_back(id);
  }
}

void add_stop_ids(const json& object, std::vector<int64_t>& ids, const char* place) {
  const auto at = object.is_object() ? object.find("eos_token_id") : object.end();
  if (!object.is_object() || at == object.end() || at->is_null()) {
    return;
  }
  for (const auto& id : at->is_array() ? *at : json::array({*at})) {
    check(id.is_number_integer() && id.get<int64_t>() >= 0,
          "[{}] eos_token_id: expected token ids, got {}",
          place,
          id.dump(-1, ' ', false, json::error_handler_t::replace));
    add_once(ids, id.get<int64_t>());
  }
}

double number_or(const json& object, const char* key, double otherwise) {
  const auto at = object.is_object() ? object.find(key) : object.end();
  if (!object.is_object() || at == object.end() || at->is_null()) {
    return otherwise;
  }
  check(at->is_number(), "[generation_config] {}: expected a number, got {}", key, at->type_name());
  return at->get<double>();
}

Description describe(const json& config, const json& generation) {
  Description result;
  result.config = parse_config(config);
  add_stop_ids(config, result.stop_ids, "config");
  const auto text = config.find("text_config");
  if (text != config.end()) {
    add_stop_ids(*text, result.stop_ids, "config");
  }
  add_stop_ids(generation, result.stop_ids, "generation_config");
  const auto& stops = result.stop_ids;
  result.instruct = std::find(stops.begin(), stops.end(), kEndOfTurn) != stops.end();
  result.sampling = {.temperature = number_or(generation, "temperature", 1.0),
                     .top_k = static_cast<int64_t>(number_or(generation, "top_k", 64)),
                     .top_p = number_or(generation, "top_p", 0.95),
                     .min_p = number_or(generation, "min_p", 0.0),
                     .repetition_penalty = number_or(generation, "repetition_penalty", 1.0)};
  check_sampling(result.sampling);
  return result;
}

std::optional<Tokenizer> make_tokenizer(std::optional<Vocabulary> vocabulary) {
  return vocabulary ? std::optional<Tokenizer>(std::move(*vocabulary)) : std::nullopt;
}

void add_tokenizer(Pretrained& into, std::optional<Tokenizer> tokenizer) {
  into.tokenizer = std::move(tokenizer);
  if (into.tokenizer) {
    for (const auto id : into.tokenizer->stop_ids()) {
      add_once(into.stop_ids, id);
    }
  }
}

}  // namespace

Description load_description(const std::string& path) {
  check_exists(path);
  if (fs::is_directory(path)) {
    auto config = folder_config(path);
    auto formats = take_formats(config, path);
    auto result = describe(config, read_json(path, "generation_config.json"));
    result.formats = std::move(formats);
    return result;
  }
  return describe(gguf_config(GgufFile(path)), {});
}

std::optional<Tokenizer> load_tokenizer(const std::string& path) {
  check_exists(path);
  return make_tokenizer(fs::is_directory(path) ? folder_vocabulary(path)
                                               : gguf_vocabulary(GgufFile(path)));
}

Pretrained load_pretrained(const std::string& path, const LoadOptions& options) {
  check_exists(path);
  Pretrained result;
  const auto finish = [&](const std::function<TensorMap()>& weights,
                          const std::function<std::optional<Vocabulary>()>& vocabulary) {
    result.config.dtype = options.dtype.value_or(result.config.dtype);
    // The tokenizer is made here and the rest beside it, not the other way round: its many small pieces of memory take
    // glibc half as long again in another thread than the first, whose heap grows by more at a time.
    auto model = std::async(std::launch::async, [&] {
      result.model = build_model(result.config, weights(), options.device, path, result.formats);
      if (options.pack_threads > 0 && Pack::refusal(result.model).empty()) {
        result.pack =
            std::make_shared<const Pack>(result.model, options.pack_format, options.pack_threads);
      }
    });
    auto tokenizer = make_tokenizer(vocabulary());
    model.get();
    add_tokenizer(result, std::move(tokenizer));
  };
  if (fs::is_directory(path)) {
    static_cast<Description&>(result) = load_description(path);
    const auto how = options.mapped ? Weights::kMapped : Weights::kCopied;
    finish([&] { return read_folder_weights(path, how); }, [&] { return folder_vocabulary(path); });
  } else {
    const GgufFile file(path);
    static_cast<Description&>(result) = describe(gguf_config(file), {});
    finish([&] { return gguf_weights(file); }, [&] { return gguf_vocabulary(file); });
  }
  return result;
}

namespace {

// Everything of a folder but the weights. `quant` is null, or goes to config.json.
void write_description(const std::string& source,
                       const Pretrained& loaded,
                       const json& quant,
                       AtomicFolder& out) {
  const bool from_folder = fs::is_directory(source);
  auto config = from_folder ? folder_config(source) : gguf_config(GgufFile(source));
  if (config.contains("text_config")) {  // only the text part is written
    config = config_to_json(loaded.config);
    config["eos_token_id"] = loaded.stop_ids;
  }
  const auto dtype = dtype_name(loaded.config.dtype);  // may have been changed in loading
  for (const char* name : {"dtype", "torch_dtype"}) {
    if (config.contains(name)) {
      config[name] = dtype;
    }
  }
  if (!quant.is_null()) {
    config["quantization_config"] = quant;
  }
  auto generation = from_folder ? read_json(source, "generation_config.json") : json();
  if (generation.is_null()) {
    generation = {{"eos_token_id", loaded.stop_ids},
                  {"do_sample", true},
                  {"temperature", loaded.sampling.temperature},
                  {"top_k", loaded.sampling.top_k},
                  {"top_p", loaded.sampling.top_p}};
  }
  write_file(out.file("config.json"), config.dump(2) + "\n");
  write_file(out.file("generation_config.json"), generation.dump(2) + "\n");
  const auto vocabulary =
      from_folder ? folder_vocabulary(source) : gguf_vocabulary(GgufFile(source));
  if (vocabulary) {
    write_file(out.file("tokenizer.model"), serialize_tokenizer_model(*vocabulary));
  }
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}) {
    if (from_folder && fs::exists(source + "/" + name)) {
      fs::copy_file(source + "/" + name, out.file(name));
    }
  }
}

// "format" is what transformers asks of a checkpoint.
void write_weights(const Gemma3Model& model, AtomicFolder& out) {
  save_safetensors(out.file("model.safetensors"), hf_weights(model), {{"format", "pt"}});
}

}  // namespace

void write_model(const std::string& source, const Pretrained& loaded, AtomicFolder& out) {
  check(packed_formats(loaded.model).empty(),
        "[write] {}: expected weights, got a folder that gemma quantize made",
        source);
  write_description(source, loaded, {}, out);
  write_weights(loaded.model, out);
}

void convert_to_folder(const std::string& source, const std::string& folder) {
  AtomicFolder out(folder);
  write_model(source, load_pretrained(source), out);
  out.commit();
}

void write_quantized(const std::string& source,
                     const Pretrained& loaded,
                     const json& report,
                     AtomicFolder& out) {
  const auto formats = packed_formats(loaded.model);
  check(!formats.empty(), "[quantize] expected a model that was rounded, got one that was not");
  write_description(source,
                    loaded,
                    {{"quant_method", kQuantMethod},
                     {"layout", kLayout},
                     {"mode", recipe_name(formats)},
                     {"formats", formats_to_json(formats)},
                     {"report", report}},
                    out);
  write_weights(loaded.model, out);
}

}  // namespace gemma_torch
