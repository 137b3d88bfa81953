// Weights, configs and tokenizers with one thing wrong each: every one must end in one clear line. The same test runs
// under AddressSanitizer and UndefinedBehaviorSanitizer (preset asan), which see a read past the end that happens to
// do no harm here.
#include <nlohmann/json.hpp>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/io/gguf_model.h"
#include "gemma_torch/io/safetensors.h"
#include "gemma_torch/io/strict_json.h"
#include "gemma_torch/model/config.h"
#include "gemma_torch/text/model_proto.h"
#include "gemma_torch/text/tokenizer_json.h"
#include "support/catch.h"
#include "support/damaged.h"
#include "support/error_of.h"
#include "support/gguf_writer.h"
#include "support/scratch.h"

using namespace gemma_torch;
using Catch::Matchers::ContainsSubstring;

namespace {

void read_as_safetensors(const std::string& bytes) {
  read_safetensors(copy_bytes(bytes, "test"));
}

/// Everything that loading a model takes from a GGUF file.
void read_as_gguf_model(const std::string& bytes) {
  const GgufFile file(copy_bytes(bytes, "test"));
  gguf_config(file);
  gguf_vocabulary(file);
  gguf_weights(file);
}

void read_as_config(const std::string& bytes) {
  parse_config(parse_strict_json(bytes, /*depth=*/16, "test"));
}

template <typename Read>
void check_all(const std::vector<Damaged>& files, size_t least, Read read) {
  CHECK(files.size() >= least);
  for (const auto& file : files) {
    INFO(file.name);
    const auto message = error_of([&] { read(file.bytes); });  // any other exception fails the test
    CHECK_THAT(message, ContainsSubstring(file.message));
    CHECK(message.starts_with('['));
    CHECK(message.find('\n') == std::string::npos);
    CHECK(message.size() < 400);
  }
}

/// Reads `good` cut at every length: each must be refused.
template <typename Read>
void check_cuts(const std::string& good, Read read) {
  for (size_t length = 0; length < good.size(); ++length) {
    INFO(length);
    CHECK_FALSE(error_of([&] { read(good.substr(0, length)); }).empty());
  }
  CHECK(error_of([&] { read(good); }).empty());
}

/// Reads `good` with each byte replaced by others: it loads or is refused, nothing else. Returns how many loaded.
template <typename Read>
int64_t change_bytes(const std::string& good, size_t end, Read read) {
  int64_t loaded = 0;
  for (size_t at = 0; at < end; ++at) {
    for (const int flip : {0x01, 0x80, 0xff}) {
      auto bytes = good;
      bytes[at] = static_cast<char>(bytes[at] ^ flip);
      loaded += error_of([&] { read(bytes); }).empty() ? 1 : 0;
    }
  }
  return loaded;
}

}  // namespace

TEST_CASE("damaged safetensors files are refused in one line", "[damaged]") {
  check_all(damaged_safetensors(), 45, read_as_safetensors);
}

TEST_CASE("damaged GGUF files are refused in one line", "[damaged]") {
  check_all(damaged_gguf(), 50, read_as_gguf_model);
}

TEST_CASE("GGUF files of something else than Gemma 3 are refused in one line", "[damaged]") {
  check_all(damaged_gguf_models(), 20, read_as_gguf_model);
}

TEST_CASE("damaged configs are refused in one line", "[damaged]") {
  check_all(damaged_configs(), 40, read_as_config);
}

TEST_CASE("damaged tokenizer.json files are refused in one line", "[damaged]") {
  check_all(damaged_tokenizer_jsons(), 20, [](const std::string& bytes) {
    parse_tokenizer_json(bytes, "test");
  });
}

TEST_CASE("damaged tokenizer.model files are refused in one line", "[damaged]") {
  check_all(damaged_tokenizer_models(), 15, [](const std::string& bytes) {
    parse_tokenizer_model(bytes, "test");
  });
}

TEST_CASE("a file cut short anywhere is refused", "[damaged]") {
  check_cuts(good_safetensors(), read_as_safetensors);
  check_cuts(good_config(), read_as_config);
  check_cuts(good_tokenizer_json(),
             [](const std::string& bytes) { parse_tokenizer_json(bytes, "test"); });
  check_cuts(good_tokenizer_model(),
             [](const std::string& bytes) { parse_tokenizer_model(bytes, "test"); });
  auto small = GgufWriter();  // the whole model has 50 kB: too many cuts
  small.strings("words", {"a", "b"});
  floats(small, "w", {8, 2});
  check_cuts(small.bytes(),
             [](const std::string& bytes) { GgufFile(copy_bytes(bytes, "test")).dequantize("w"); });
}

TEST_CASE("a file with a changed byte loads or is refused", "[damaged]") {
  const auto tensors = good_safetensors();
  const int64_t loaded = change_bytes(tensors, tensors.size(), read_as_safetensors);
  CHECK(loaded >= 12 * 3);  // at least every change to the 12 bytes of data
  const auto gguf = tiny_gemma_gguf();
  const size_t header = gguf.bytes().size() - gguf.data.size();
  CHECK(change_bytes(gguf.bytes(), header, read_as_gguf_model) > 0);
  const auto config = good_config();
  CHECK(change_bytes(config, config.size(), read_as_config) > 0);
}

TEST_CASE("files that cannot be read are refused by path", "[damaged]") {
  const ScratchFolder folder("gemma_damaged");
  for (const auto& path : {folder / "none", folder.path().string()}) {
    INFO(path);
    CHECK_THAT(error_of([&] { load_safetensors(path); }), ContainsSubstring(path));
    CHECK_THAT(error_of([&] { GgufFile{path}; }), ContainsSubstring(path));
    CHECK_THAT(error_of([&] { load_sharded_safetensors(path); }), ContainsSubstring(path));
    CHECK_THAT(error_of([&] { read_tokenizer_json(path); }), ContainsSubstring(path));
    CHECK_THAT(error_of([&] { read_tokenizer_model(path); }), ContainsSubstring(path));
  }
}

TEST_CASE("damaged shard indexes are refused in one line", "[damaged]") {
  const ScratchFolder folder("gemma_damaged_index");
  const auto path = folder / "index";
  const std::string deep(100'000, '[');
  const std::vector<Damaged> files = {
      {"empty", "", "[json]"},
      {"array", "[]", "weight_map"},
      {"no_map", "{}", "weight_map"},
      {"map_array", R"({"weight_map":[]})", "weight_map"},
      {"deep", R"({"weight_map":)" + deep, "nesting"},
      {"shard_number", R"({"weight_map":{"a":1}})", "plain file name"},
      {"shard_empty", R"({"weight_map":{"a":""}})", "plain file name"},
      {"shard_parent", R"({"weight_map":{"a":"../x"}})", "plain file name"},
      {"shard_absolute", R"({"weight_map":{"a":"/etc/passwd"}})", "plain file name"},
      {"shard_dots", R"({"weight_map":{"a":".."}})", "plain file name"},
      {"shard_nul", R"({"weight_map":{"a":"x\u0000y"}})", "plain file name"},
      {"shard_newline", R"({"weight_map":{"a\n":"../\n"}})", "plain file name"},
      {"shard_missing", R"({"weight_map":{"a":"none"}})", "none"},
      {"name_twice", R"({"weight_map":{"a":"x","a":"y"}})", "twice"},
  };
  check_all(files, 14, [&](const std::string& bytes) {
    write_file(path, bytes);
    load_sharded_safetensors(path);
  });
}
