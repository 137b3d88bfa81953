#include "gemma_torch/adapt/rounded_adamw.h"

#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>

#include <algorithm>
#include <cmath>

#include "gemma_torch/adapt/training_ops.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/base/mix.h"
#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/kernels/cpu/training_kernels.h"

namespace gemma_torch {
namespace {

constexpr int64_t kPiece = int64_t{4} << 20;  // numbers that are widened at a time
constexpr int64_t kShare = int64_t{1} << 16;  // least numbers of a thread
constexpr int64_t kLow32 = 0xffffffff;

uint32_t seed_of(const RoundedStep& step) {
  return static_cast<uint32_t>(mix(static_cast<uint64_t>(step.step - 1) * kMixStep, step.stream));
}

kernels::AdamWFactors factors_of(const RoundedStep& step) {
  const auto count = static_cast<double>(step.step);
  const auto number = [](double x) { return static_cast<float>(x); };
  return {.gradient = number(step.factor),
          .beta1 = number(step.beta1),
          .beta2 = number(step.beta2),
          .keep = number(1 - step.learning_rate * step.weight_decay),
          .rate = number(step.learning_rate / (1 - std::pow(step.beta1, count))),
          .root = number(1 / std::sqrt(1 - std::pow(step.beta2, count))),
          .eps = number(step.eps),
          .seed = seed_of(step)};
}

template <typename G>
void run_kernel(const RoundedTensors& tensors,
                const kernels::AdamWFactors& by,
                void (*kernel)(const kernels::RoundedAdamW<G>&,
                               int64_t,
                               int64_t,
                               const kernels::AdamWFactors&)) {
  const auto data = [](const at::Tensor& x) {
    return static_cast<kernels::Bf16*>(x.mutable_data_ptr());
  };
  const auto gradient = tensors.gradient.contiguous();
  const kernels::RoundedAdamW<G> all = {data(tensors.parameter),
                                        data(tensors.exp_avg),
                                        data(tensors.exp_avg_sq),
                                        static_cast<const G*>(gradient.const_data_ptr())};
  at::parallel_for(0, tensors.parameter.numel(), kShare, [&](int64_t begin, int64_t end) {
    kernel(
        {all.parameter + begin, all.exp_avg + begin, all.exp_avg_sq + begin, all.gradient + begin},
        begin,
        end - begin,
        by);
  });
}

// hash(seed + first) .. of the kernels' .inl, as numbers of 64 bits.
at::Tensor chance_of(int64_t first, int64_t n, uint32_t seed, at::Device device) {
  auto x = at::arange(n, at::TensorOptions(at::kLong).device(device));
  x.add_((first + seed) & kLow32).bitwise_and_(kLow32);
  x = x.bitwise_xor(x.bitwise_right_shift(16)).mul_(0x7feb352d).bitwise_and_(kLow32);
  x = x.bitwise_xor(x.bitwise_right_shift(15)).mul_(0x846ca68b).bitwise_and_(kLow32);
  return x.bitwise_xor(x.bitwise_right_shift(16));
}

void round_into(const at::Tensor& narrow, const at::Tensor& wide, const at::Tensor& chance) {
  const auto bits = wide.view(at::kInt).add(chance.to(at::kInt)).bitwise_and_(-0x10000);
  narrow.copy_(bits.view(at::kFloat));
}

}  // namespace

void step_rounded(const RoundedTensors& tensors, const RoundedStep& step) {
  for (const auto& tensor : {tensors.parameter, tensors.exp_avg, tensors.exp_avg_sq}) {
    check(tensor.scalar_type() == at::kBFloat16 && tensor.is_contiguous() &&
              tensor.sizes() == tensors.gradient.sizes(),
          "[adamw] expected contiguous bfloat16 of the gradient's shape {}, got {} {}",
          shape_str(tensors.gradient.sizes()),
          c10::toString(tensor.scalar_type()),
          shape_str(tensor.sizes()));
  }
  if (!has_training_kernels(tensors.parameter)) {
    step_rounded_written_out(tensors, step);
    return;
  }
  const auto& adamw = kernels::training_kernels(kernels::best_isa()).adamw;
  const auto by = factors_of(step);
  tensors.gradient.scalar_type() == at::kFloat ? run_kernel(tensors, by, adamw.f32)
                                               : run_kernel(tensors, by, adamw.bf16);
}

void step_rounded_written_out(const RoundedTensors& tensors, const RoundedStep& step) {
  const auto by = factors_of(step);
  const auto all = tensors.parameter.numel();
  for (int64_t start = 0; start < all; start += kPiece) {
    const auto n = std::min(kPiece, all - start);
    const auto part = [&](const at::Tensor& x) { return x.view(-1).narrow(/*dim=*/0, start, n); };
    const auto slope = part(tensors.gradient.contiguous()).to(at::kFloat).mul(by.gradient);
    const auto mean = part(tensors.exp_avg).to(at::kFloat).mul_(by.beta1).add_(slope, 1 - by.beta1);
    const auto square =
        part(tensors.exp_avg_sq).to(at::kFloat).mul_(by.beta2).addcmul_(slope, slope, 1 - by.beta2);
    const auto x = part(tensors.parameter)
                       .to(at::kFloat)
                       .mul_(by.keep)
                       .addcdiv_(mean, square.sqrt().mul_(by.root).add_(by.eps), -by.rate);
    const auto chance = chance_of(start, n, by.seed, x.device());
    round_into(part(tensors.parameter), x, chance.bitwise_right_shift(16));
    round_into(part(tensors.exp_avg), mean, chance.bitwise_and(0xffff));
    round_into(part(tensors.exp_avg_sq), square, chance.bitwise_and(0xffff));
  }
}

}  // namespace gemma_torch
