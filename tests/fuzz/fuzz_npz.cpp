#include "fuzz.h"
#include "gemma_torch/io/npy.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace gemma_torch;
  const auto file = copy_bytes(as_text(data, size), "fuzz");
  return load_or_refuse([&] {
    load_or_refuse([&] { read_npy(file); });
    read_npz(file);
  });
}
