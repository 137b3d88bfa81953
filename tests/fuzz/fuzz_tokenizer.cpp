#include "fuzz.h"
#include "gemma_torch/text/model_proto.h"
#include "gemma_torch/text/tokenizer.h"
#include "gemma_torch/text/tokenizer_json.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace gemma_torch;
  const auto text = as_text(data, size);
  return load_or_refuse([&] {
    const auto vocabulary = text.starts_with('{') ? parse_tokenizer_json(text, "fuzz")
                                                  : parse_tokenizer_model(text, "fuzz");
    const Tokenizer tokenizer(vocabulary);
    const auto ids = tokenizer.encode("ab  b\n\n<bos>\u2581\u2581\u00e9", {.add_bos = false});
    tokenizer.decode(ids);
  });
}
