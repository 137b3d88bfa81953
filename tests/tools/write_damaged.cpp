// write_damaged FOLDER: the damaged files of tests/support/damaged.h and the good ones they come from, one folder per
// fuzzer, as its first inputs.
#include <filesystem>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/io/gguf_dequantize.h"
#include "support/damaged.h"
#include "support/gguf_writer.h"

namespace {

void write(const std::filesystem::path& folder,
           const std::string& good,
           const std::vector<Damaged>& files) {
  std::filesystem::create_directories(folder);
  gemma_torch::write_file(folder / "good", good);
  for (const auto& [name, bytes, message] : files) {
    if (bytes.size() < 8192) {  // the deep ones: a fuzzer would waste its time on their length
      gemma_torch::write_file(folder / name, bytes);
    }
  }
}

/// One block of every tensor type.
void write_block_types(const std::filesystem::path& folder) {
  for (uint32_t type = 0; type <= 30; ++type) {
    if (const auto* layout = gemma_torch::find_layout(type)) {
      GgufWriter file;
      file.tensor("w",
                  {static_cast<uint64_t>(layout->values)},
                  type,
                  std::string(static_cast<size_t>(layout->bytes), '\x35'));
      gemma_torch::write_file(folder / layout->name, file.bytes());
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    gemma_torch::check(argc == 2, "usage: write_damaged FOLDER");
    const std::filesystem::path folder = argv[1];
    write(folder / "safetensors", good_safetensors(), damaged_safetensors());
    const auto whole = tiny_gemma_gguf();
    GgufWriter small;  // all the metadata, few of the tensors
    small.values = whole.values;
    small.value_count = whole.value_count;
    floats(small, "token_embd.weight", {32, 4});
    floats(small, "output_norm.weight", {32});
    write(folder / "gguf", small.bytes(), damaged_gguf_models());
    write(folder / "gguf", small.bytes(), damaged_gguf());
    write_block_types(folder / "gguf");
    write(folder / "config_json", good_config(), damaged_configs());
    write(folder / "tokenizer", good_tokenizer_json(), damaged_tokenizer_jsons());
    write(folder / "tokenizer", good_tokenizer_model(), damaged_tokenizer_models());
  } catch (const gemma_torch::Error& error) {
    fmt::print(stderr, "write_damaged: error: {}\n", error.what());
    return 1;
  }
}
