#pragma once

#include <ATen/DeviceAccelerator.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "gemma_torch/base/device.h"
#include "gemma_torch/pretrained.h"
#include "notebook.h"

// The last cell of both notebooks: what the generated text is compared with, and how fast it came.

namespace gemma_torch::notebook {

inline constexpr std::string_view kBaseModel =
    "the notebook runs the instruct model, this folder holds a base model. Hint: hf download "
    "google/gemma-3-270m-it --local-dir gemma-3-270m-it, then name that folder";

/// Two best logits nearer than this may change places when bfloat16 sums are taken in another
/// order: 4 steps of bfloat16 at logits of 16 to 32.
inline constexpr double kNearTie = 0.5;

struct Generated {
  std::vector<int64_t> prompt, ids;  // the ids without the one that ended the text
  bool ended = false;                // by <end_of_turn>, not by the number of tokens
  double seconds = 0;
};

/// How far the best next token after `prompt` and the first `count` new ids leads the second best.
inline double lead(Gemma3Model& model, const Generated& generated, size_t count) {
  const at::NoGradGuard no_grad;
  auto ids = generated.prompt;
  ids.insert(ids.end(), generated.ids.begin(), generated.ids.begin() + static_cast<int64_t>(count));
  const auto input =
      at::tensor(ids, at::kLong).unsqueeze(/*dim=*/0).to(model->tok_emb->weight.device());
  const auto logits = model->forward(input).select(/*dim=*/1, /*index=*/-1).squeeze(/*dim=*/0);
  const auto best = std::get<0>(logits.to(at::kDouble).topk(/*k=*/2));
  return (best[0] - best[1]).item<double>();
}

/// Compares a text with the notebook's, up to the end of the shorter one. At the first difference
/// our best token must be hardly better than the next.
inline void compare_text(Pretrained& loaded,
                         const Generated& generated,
                         std::string_view notebook,
                         Marks& marks) {
  if (!loaded.instruct) {
    marks.differs(kBaseModel);
    return;
  }
  const auto printed = std::string(notebook) + "<end_of_turn>";
  auto ids = generated.ids;
  if (generated.ended) {
    ids.push_back(loaded.tokenizer->end_of_turn_id());
  }
  std::string same;  // text of the tokens that agree
  for (size_t i = 0; i < ids.size() && same.size() < printed.size(); ++i) {
    const auto longer = same + loaded.tokenizer->decode({ids[i]});
    if (!printed.starts_with(longer.substr(0, printed.size()))) {
      const auto margin = lead(loaded.model, generated, i);
      const auto where = fmt::format(
          "after {} characters, where the notebook goes on {} and our best token leads by {:.3f}: ",
          same.size(),
          python_string(printed.substr(same.size(), 24)),
          margin);
      if (margin > kNearTie) {
        marks.equal(false, where + "other weights than the notebook's");
      } else {
        marks.differs(where + "a near tie, which bfloat16 sums in another order turn");
      }
      return;
    }
    same = longer;
  }
  marks.equal(true,
              fmt::format("{} of the notebook's {} characters",
                          std::min(same.size(), notebook.size()),
                          notebook.size()));
}

inline void print_speed(const Generated& generated, c10::Device device) {
  const auto tokens = generated.ids.size();
  fmt::print(
      "\n{} tokens in {:.2f} s: {:.1f} tokens per second on {} with {} threads (the notebook "
      "prints no speed)\n",
      tokens,
      generated.seconds,
      static_cast<double>(tokens) / generated.seconds,
      device.str(),
      at::get_num_threads());
  if (device.is_cuda()) {
    const auto stats = at::accelerator::getDeviceStats(at::accelerator::getDeviceIndex());
    const auto total = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    fmt::print("GPU memory used: {:.2f} GB\n",
               static_cast<double>(stats.allocated_bytes[total].peak) / (1 << 30));
  } else {
    fmt::print("Memory used: {:.2f} GB, at its most\n",
               static_cast<double>(peak_memory_bytes()) / (1 << 30));
  }
}

}  // namespace gemma_torch::notebook
