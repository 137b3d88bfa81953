// dump_logits MODEL WINDOWS FIRST QUANT PIECE: writes to standard output the float32 logits, a row of the vocabulary for
// each, of the positions FIRST to the last but one of every window. WINDOWS is a file with a window a line, ids with
// spaces between; QUANT is none or int8 (of a folder that `gemma quantize` made: none); PIECE tokens pass at a time. The
// bytes that a token costs go to standard error. For tests/reference/measure_quality.py.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/engine/engine.h"
#include "gemma_torch/pretrained.h"

namespace {

using namespace gemma_torch;

std::vector<std::vector<int64_t>> read_windows(const std::string& path) {
  std::vector<std::vector<int64_t>> windows;
  std::istringstream lines(read_file(path));
  for (std::string line; std::getline(lines, line);) {
    std::istringstream numbers(line);
    auto& window = windows.emplace_back();
    for (int64_t id = 0; numbers >> id;) {
      window.push_back(id);
    }
    check(numbers.eof() && window.size() >= 2,
          "[dump_logits] {}: line {}: expected two ids or more, got '{}'",
          path,
          windows.size(),
          line);
  }
  return windows;
}

void write_logits(Engine& engine,
                  const std::vector<int64_t>& window,
                  int64_t first,
                  int64_t piece) {
  const auto end = static_cast<int64_t>(window.size()) - 1;  // nothing is known to follow the last
  engine.reset();
  for (int64_t start = 0; start < end; start += piece) {
    const auto stop = std::min(start + piece, end);
    engine.append(std::vector<int64_t>(window.begin() + start, window.begin() + stop));
    if (stop <= first) {
      continue;
    }
    const auto logits = engine.logits(Rows::kAll);
    const auto skipped = std::max(first - start, int64_t{0});
    const auto count = static_cast<size_t>((stop - start - skipped) * engine.vocab_size());
    const auto* from = logits.const_data_ptr<float>() + skipped * engine.vocab_size();
    check(std::fwrite(from, sizeof(float), count, stdout) == count,
          "[dump_logits] standard output: expected room for {} numbers, got none",
          count);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const std::vector<std::string> words(argv + 1, argv + argc);
    check(words.size() == 5 && (words[3] == "none" || words[3] == "int8"),
          "usage: dump_logits MODEL WINDOWS FIRST none|int8 PIECE");
    const auto windows = read_windows(words[1]);
    const auto first = std::stoll(words[2]), piece = std::stoll(words[4]);
    check(first >= 0 && piece >= 1,
          "[dump_logits] FIRST and PIECE: expected at least 0 and 1, got {} and {}",
          first,
          piece);
    size_t longest = 0;
    for (const auto& window : windows) {
      longest = std::max(longest, window.size());
    }
    const auto loaded = load_pretrained(words[0]);
    EngineOptions options{.kind = EngineKind::kFused, .capacity = static_cast<int64_t>(longest)};
    options.fused.quant = words[3] == "int8" ? OnTheFly::kInt8 : OnTheFly::kNone;
    const auto engine = make_engine(loaded.model, options);
    for (const auto& window : windows) {
      write_logits(*engine, window, first, piece);
    }
    fmt::print(stderr, "{}\n", engine->report(0).bytes_per_token);
  } catch (const std::exception& error) {
    fmt::print(stderr, "dump_logits: {}\n", error.what());
    return 1;
  }
  return 0;
}
