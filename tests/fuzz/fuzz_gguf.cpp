#include <nlohmann/json.hpp>

#include "fuzz.h"
#include "gemma_torch/io/gguf_model.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace gemma_torch;
  return load_or_refuse([&] {
    const GgufFile file(copy_bytes(as_text(data, size), "fuzz"));
    for (const auto& [name, tensor] : file.tensors()) {
      file.dequantize(name);
      file.dequantize(name, at::kBFloat16);
    }
    load_or_refuse([&] { gguf_vocabulary(file); });
    load_or_refuse([&] { gguf_config(file); });
    load_or_refuse([&] { gguf_weights(file); });
  });
}
