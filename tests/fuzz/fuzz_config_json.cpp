#include <nlohmann/json.hpp>

#include "fuzz.h"
#include "gemma_torch/io/strict_json.h"
#include "gemma_torch/model/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace gemma_torch;
  return load_or_refuse([&] {
    const auto cfg = parse_config(parse_strict_json(as_text(data, size), /*depth=*/16, "fuzz"));
    const auto json = config_to_json(cfg);
    if (config_to_json(parse_config(json)) != json) {
      __builtin_trap();  // a config that was accepted must survive being written and read
    }
  });
}
