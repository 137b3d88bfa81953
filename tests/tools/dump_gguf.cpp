// dump_gguf FILE.gguf OUT.safetensors [--model]: every tensor of the file in float32 under its GGUF
// name, or with
// --model what gguf_weights makes of them (Hugging Face names, bfloat16). For
// tests/reference/check_gguf.py.
#include <chrono>
#include <cstdio>
#include <string>

#include "gemma_torch/base/error.h"
#include "gemma_torch/io/gguf_model.h"
#include "gemma_torch/io/safetensors.h"

int main(int argc, char** argv) {
  using namespace gemma_torch;
  using Clock = std::chrono::steady_clock;
  try {
    check(argc == 3 || (argc == 4 && std::string(argv[3]) == "--model"),
          "usage: dump_gguf FILE.gguf OUT.safetensors [--model]");
    const auto start = Clock::now();
    const GgufFile file(argv[1]);
    TensorMap tensors;
    if (argc == 4) {
      tensors = gguf_weights(file);
    } else {
      for (const auto& [name, tensor] : file.tensors()) {
        tensors[name] = file.dequantize(name);
      }
    }
    const std::chrono::duration<double> seconds = Clock::now() - start;
    save_safetensors(argv[2], tensors);
    fmt::print("{} tensors in {:.2f} s\n", tensors.size(), seconds.count());
  } catch (const Error& error) {
    fmt::print(stderr, "dump_gguf: error: {}\n", error.what());
    return 1;
  }
}
