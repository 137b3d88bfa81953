#pragma once

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

#include "notebook.h"

// Cell 19: logits of a model with random weights. They are the notebook's only if the weights are,
// and those depend on the version of torch.

namespace gemma_torch::notebook {

/// What Python shows of logits (1, 3, V): the first and last three columns of each row.
using Shown = std::array<std::array<double, 6>, 3>;

/// Most that two bfloat16 runs of the quick check may differ: 4 steps of bfloat16 just below 1.
/// Sums taken in another order part the two notebooks by 2 steps, and bfloat16 from float32 by 3;
/// logits of unrelated weights lie about 0.8 apart.
inline constexpr double kTolerance = 1.0 / 64;

inline Shown shown_values(const at::Tensor& logits) {
  const auto rows = logits.detach().to(at::kDouble).squeeze(/*dim=*/0).contiguous();
  const auto values = rows.accessor<double, 2>();
  const auto V = rows.size(1);
  Shown shown{};
  for (int64_t row = 0; row < 3; ++row) {
    int i = 0;
    for (const auto column : {int64_t{0}, int64_t{1}, int64_t{2}, V - 3, V - 2, V - 1}) {
      shown[static_cast<size_t>(row)][static_cast<size_t>(i++)] = values[row][column];
    }
  }
  return shown;
}

inline void print_logits(const Shown& shown) {
  for (size_t row = 0; row < shown.size(); ++row) {
    const auto& x = shown[row];
    fmt::print("{}[{:7.4f}, {:7.4f}, {:7.4f},  ..., {:7.4f}, {:7.4f}, {:7.4f}]{}\n",
               row == 0 ? "tensor([[" : "         ",
               x[0],
               x[1],
               x[2],
               x[3],
               x[4],
               x[5],
               row == 2 ? "]]," : ",");
  }
  fmt::print("       dtype=torch.bfloat16)\n");
}

/// Infinite if a value is not a number.
inline double largest_difference(const Shown& a, const Shown& b) {
  double largest = 0;
  for (size_t row = 0; row < a.size(); ++row) {
    for (size_t i = 0; i < a[row].size(); ++i) {
      const auto difference = std::abs(a[row][i] - b[row][i]);
      largest = std::isnan(difference) ? INFINITY : std::max(largest, difference);
    }
  }
  return largest;
}

/// Puts table[byte] in the place of each byte; 256 bfloat16 values.
inline void look_up(const at::Tensor& bytes, const at::Tensor& table, at::Tensor& weight) {
  const auto* value = table.const_data_ptr<c10::BFloat16>();
  const auto* byte = bytes.const_data_ptr<uint8_t>();
  std::transform(
      byte, byte + bytes.numel(), weight.mutable_data_ptr<c10::BFloat16>(), [&](uint8_t b) {
        return value[b];
      });
}

/// Fills the weights as manual_seed(seed) and the notebook's model did on the CPU up to torch 2.10:
/// a uniform in bfloat16 was 8 bits of one random number, a normal the Box-Muller transform of two
/// such uniforms, every step rounded to bfloat16. Later versions draw in float32 and round once
/// (pytorch issue 166853). The random numbers themselves, one for each weight, are the same. The
/// norms' weights are zeros in both.
inline void draw_as_older_torch(Gemma3Model& model, uint64_t seed) {
  const at::NoGradGuard no_grad;
  at::manual_seed(seed);
  const auto uniform = at::arange(256, at::kFloat) / 256;  // [0, 1), exact in bfloat16
  const auto bytes_like = [](const at::Tensor& weight) {
    return at::empty(weight.sizes(), at::kByte).random_(/*from=*/0, /*to=*/256);
  };

  // Normals: of each 16 numbers, the first 8 give radii and the last 8 angles of 8 pairs.
  const auto bfloat16 = uniform.to(at::kBFloat16);
  const auto radius = (-2 * (1 - bfloat16).log()).sqrt().unsqueeze(/*dim=*/1);
  const auto theta = (2 * M_PI * bfloat16.to(at::kDouble)).to(at::kBFloat16);
  const auto first = (radius * theta.cos()).contiguous();  // (256, 256)
  const auto second = (radius * theta.sin()).contiguous();
  const auto bytes = bytes_like(model->tok_emb->weight);
  const auto* byte = bytes.const_data_ptr<uint8_t>();
  auto* weight = model->tok_emb->weight.mutable_data_ptr<c10::BFloat16>();
  for (int64_t i = 0; i < bytes.numel(); i += 16) {
    for (int64_t j = i; j < i + 8; ++j) {
      const auto pair = 256 * byte[j] + byte[j + 8];
      weight[j] = first.const_data_ptr<c10::BFloat16>()[pair];
      weight[j + 8] = second.const_data_ptr<c10::BFloat16>()[pair];
    }
  }

  model->for_each_linear([&](torch::nn::Module&, const std::string&, Linear& linear) {
    const auto bound = 1 / std::sqrt(static_cast<double>(linear->in_features));
    const auto from = at::full({1}, -bound, at::kBFloat16).to(at::kFloat);
    const auto table = (uniform * (from * -2) + from).to(at::kBFloat16);
    look_up(bytes_like(linear->weight), table, linear->weight);
  });
}

/// Shows the logits of ids 1, 2, 3 and compares them with the notebook's. If they differ, the
/// weights were drawn otherwise: it draws them as the notebook did and compares again.
inline void quick_check(Gemma3Model& model, uint64_t seed, const Shown& printed, Marks& marks) {
  const auto input = at::tensor({1, 2, 3}, at::kLong).unsqueeze(/*dim=*/0);
  auto shown = shown_values(model->forward(input));
  print_logits(shown);
  if (largest_difference(shown, printed) > kTolerance) {
    marks.differs(
        "torch 2.9 and 2.10, which ran the notebooks, drew bfloat16 weights from 8 random bits, "
        "this LibTorch draws them in float32. With the weights drawn their way:");
    draw_as_older_torch(model, seed);
    shown = shown_values(model->forward(input));
    print_logits(shown);
  }
  const auto largest = largest_difference(shown, printed);
  marks.equal(largest <= kTolerance,
              fmt::format("largest difference to the notebook {:.4f}, tolerance {:.4f} (bfloat16)",
                          largest,
                          kTolerance));
}

}  // namespace gemma_torch::notebook
