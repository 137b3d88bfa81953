#pragma once

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/model/gemma3.h"

// What both notebook programs need and no notebook has: arguments, and marks that say which printed
// values are the notebook's own.

namespace gemma_torch::notebook {

inline constexpr int kSkipped = 77;  // what CTest reads as "could not run here"

struct Arguments {
  std::string folder;  // HF folder or .gguf
  int64_t max_new_tokens = 0;
};

/// Where apps/ keeps the fetched model.
inline std::string default_folder() {
  const auto from = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
  if (const auto own = from("GEMMA_TORCH_CACHE"); !own.empty()) {
    return own + "/gemma-3-270m";
  }
  const auto xdg = from("XDG_CACHE_HOME");
  return (xdg.empty() ? from("HOME") + "/.cache" : xdg) + "/gemma_torch/gemma-3-270m";
}

/// Throws: Error for anything but one folder and --max-new-tokens with a number from 1 to 500.
inline Arguments parse_arguments(const std::vector<std::string>& given, int64_t max_new_tokens) {
  Arguments arguments{.folder = "", .max_new_tokens = max_new_tokens};
  for (size_t i = 0; i < given.size(); ++i) {
    const auto& word = given[i];
    if (word == "--max-new-tokens") {
      const auto number = i + 1 < given.size() ? given[++i] : std::string();
      const auto* end = number.data() + number.size();
      const auto parsed = std::from_chars(number.data(), end, arguments.max_new_tokens);
      check(parsed.ec == std::errc() && parsed.ptr == end && arguments.max_new_tokens >= 1 &&
                arguments.max_new_tokens <= 500,
            "[arguments] --max-new-tokens: expected 1 to 500, got \"{}\"",
            number);
    } else {
      check(!word.starts_with("-") && arguments.folder.empty(),
            "[arguments] expected [MODEL_FOLDER] [--max-new-tokens N], got \"{}\"",
            word);
      arguments.folder = word;
    }
  }
  return arguments;
}

inline void cell(int number, std::string_view what) {
  fmt::print("\n---- cell {}: {}\n", number, what);
}

/// Compares what a program prints with what the notebook prints, and says so under each value.
class Marks {
 public:
  /// A value that must be the notebook's.
  void equal(bool ok, std::string_view what) {
    ++(ok ? equal_ : wrong_);
    fmt::print("     {} {}\n", ok ? "[equal]" : "[WRONG: not equal]", what);
  }

  /// A value that cannot be the notebook's, with the reason.
  void differs(std::string_view reason) {
    ++differ_;
    fmt::print("     [differs] {}\n", reason);
  }

  /// Prints the sums. 1 if a value that must be equal is not.
  int finish() const {
    fmt::print(
        "\n---- compared with the notebook: {} equal, {} differ for the reason given, {} wrong\n",
        equal_,
        differ_,
        wrong_);
    return wrong_ == 0 ? 0 : 1;
  }

 private:
  int equal_ = 0, differ_ = 0, wrong_ = 0;
};

/// Runs a notebook's cells and turns errors into one line and an exit code: 1, for bad arguments 2,
/// without the default weights 77.
inline int run(int argc,
               char** argv,
               int64_t max_new_tokens,
               void (*cells)(const Arguments&, Marks&)) {
  const std::vector<std::string> given(argv + 1, argv + argc);
  const auto name = std::filesystem::path(argv[0]).filename().string();
  const auto usage =
      fmt::format("{} [MODEL_FOLDER] [--max-new-tokens N = {}]", name, max_new_tokens);
  if (given == std::vector<std::string>{"--help"}) {
    fmt::print("{}\n", usage);
    return 0;
  }
  int failed = 2;
  try {
    auto arguments = parse_arguments(given, max_new_tokens);
    failed = 1;
    if (arguments.folder.empty()) {
      arguments.folder = default_folder();
      if (!std::filesystem::exists(arguments.folder)) {
        fmt::print(
            stderr,
            "{}: skipped, no weights in {}. Hint: `bash cmake/run.sh` fetches them, or name a "
            "folder: {}\n",
            name,
            arguments.folder,
            usage);
        return kSkipped;
      }
    }
    // Lines appear when they are printed, in a file or a pipe too.
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    at::set_num_threads(usable_cores());
    Marks marks;
    cells(arguments, marks);
    return marks.finish();
  } catch (const c10::Error& error) {
    fmt::print(stderr, "{}: error: [libtorch] {}\n", name, error.what_without_backtrace());
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}: error: {}\n", name, error.what());
  }
  return failed;
}

/// 435870336 -> "435,870,336", as Python's `:,`.
inline std::string with_commas(int64_t number) {
  return number < 1000 ? std::to_string(number)
                       : fmt::format("{},{:03}", with_commas(number / 1000), number % 1000);
}

/// As Python shows a string: in quotes, a line feed written \n.
inline std::string python_string(std::string_view text) {
  std::string out;
  for (const char c : text) {
    out += c == '\n' ? std::string("\\n") : std::string(1, c);
  }
  return fmt::format("'{}'", out);
}

// ---- cell 17: a module as Python prints it

/// "torch::nn::ModuleListImpl" -> "ModuleList"
inline std::string class_name(const torch::nn::Module& module) {
  auto name = module.name();
  const auto scope = name.rfind("::");
  name = scope == std::string::npos ? name : name.substr(scope + 2);
  return name.ends_with("Impl") ? name.substr(0, name.size() - 4) : name;
}

/// The module and its children, one a line, indented by two; equal neighbours of a list are one.
inline std::string describe(const torch::nn::Module& module, const std::string& indent = "") {
  if (const auto* embedding = module.as<torch::nn::Embedding>()) {
    return fmt::format("Embedding({}, {})", embedding->weight.size(0), embedding->weight.size(1));
  }
  if (module.children().empty()) {
    std::ostringstream text;
    module.pretty_print(text);
    return text.str();
  }
  struct Entry {
    std::string first, last, text;
    int count = 1;
  };
  const auto inner = indent + "  ";
  const bool is_list = module.as<torch::nn::ModuleList>() != nullptr;
  std::vector<Entry> entries;
  for (const auto& child : module.named_children()) {
    const auto text = describe(*child.value(), inner);
    if (is_list && !entries.empty() && entries.back().text == text) {
      entries.back().last = child.key();
      ++entries.back().count;
    } else {
      entries.push_back({child.key(), child.key(), text});
    }
  }
  auto out = class_name(module) + "(\n";
  for (const auto& entry : entries) {
    out +=
        entry.count == 1
            ? fmt::format("{}({}): {}\n", inner, entry.first, entry.text)
            : fmt::format(
                  "{}({}-{}): {} x {}\n", inner, entry.first, entry.last, entry.count, entry.text);
  }
  return out + indent + ")";
}

inline constexpr std::string_view kArchitecture = R"(Gemma3Model(
  (tok_emb): Embedding(262144, 640)
  (blocks): ModuleList(
    (0-17): 18 x TransformerBlock(
      (att): GroupedQueryAttention(
        (W_query): Linear(in_features=640, out_features=1024, bias=False)
        (W_key): Linear(in_features=640, out_features=256, bias=False)
        (W_value): Linear(in_features=640, out_features=256, bias=False)
        (out_proj): Linear(in_features=1024, out_features=640, bias=False)
        (q_norm): RMSNorm()
        (k_norm): RMSNorm()
      )
      (ff): FeedForward(
        (fc1): Linear(in_features=640, out_features=2048, bias=False)
        (fc2): Linear(in_features=640, out_features=2048, bias=False)
        (fc3): Linear(in_features=2048, out_features=640, bias=False)
      )
      (input_layernorm): RMSNorm()
      (post_attention_layernorm): RMSNorm()
      (pre_feedforward_layernorm): RMSNorm()
      (post_feedforward_layernorm): RMSNorm()
    )
  )
  (final_norm): RMSNorm()
  (out_head): Linear(in_features=640, out_features=262144, bias=False)
))";

// ---- cell 21

/// Prints the memory of parameters and gradients in two dtypes, in GB of 2^30 bytes.
inline void calc_model_memory_size(const torch::nn::Module& model,
                                   const Gemma3Config& cfg,
                                   Marks& marks) {
  int64_t numbers = 0;
  for (const auto& parameter : model.parameters()) {
    numbers += parameter.numel() * (parameter.requires_grad() ? 2 : 1);
  }
  // The notebook's model also holds cos and sin of every position for both thetas. Ours computes
  // the rows that a call needs.
  const auto tables = 4 * cfg.context_length * cfg.head_dim;
  const auto print = [&](const char* name, int64_t bytes, std::string_view printed) {
    const auto gb = [&](int64_t count) {
      return fmt::format("{:.2f} GB", static_cast<double>(count * bytes) / (1 << 30));
    };
    fmt::print(
        "{}: {}, with the notebook's RoPE tables {}\n", name, gb(numbers), gb(numbers + tables));
    marks.equal(gb(numbers + tables) == printed,
                fmt::format("{} with the tables, which this model does without", printed));
  };
  print("float32 (PyTorch default)", 4, "3.37 GB");
  print("bfloat16", 2, "1.69 GB");
}

}  // namespace gemma_torch::notebook
