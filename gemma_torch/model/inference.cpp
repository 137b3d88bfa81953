#include "gemma_torch/model/inference.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/rms_norm.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <vector>

#include "gemma_torch/kernels/cpu/row_kernels.h"

namespace gemma_torch {
namespace {

using kernels::Bf16;
using kernels::row_kernels;

// Rows of a product that are worth a thread of their own: about 64 KiB of weights.
int64_t grain(int64_t columns) {
  return std::max<int64_t>(1, 32'768 / columns);
}

template <typename T>
const T* data(const at::Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

}  // namespace

bool has_kernels(const at::Tensor& x) {
  return c10::InferenceMode::is_enabled() && x.device().is_cpu() &&
         (x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat);
}

bool is_row_product(const at::Tensor& x, const at::Tensor& weight) {
  return has_kernels(x) && x.numel() == x.size(-1) && weight.device().is_cpu() &&
         weight.scalar_type() == x.scalar_type() && weight.is_contiguous() && x.is_contiguous();
}

at::Tensor row_product(const at::Tensor& x, const at::Tensor& weight) {
  const auto rows = weight.size(0);
  const auto columns = weight.size(1);
  auto sizes = x.sizes().vec();
  sizes.back() = rows;
  auto y = at::empty(sizes, x.options());
  const auto& kernel = row_kernels();
  if (x.scalar_type() == at::kFloat) {
    at::parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
      kernel.gemv_f32(data<float>(weight) + begin * columns,
                      data<float>(x),
                      y.mutable_data_ptr<float>() + begin,
                      end - begin,
                      columns);
    });
    return y;
  }
  std::vector<float> wide(static_cast<size_t>(columns));
  kernel.widen_bf16(data<Bf16>(x), wide.data(), columns);
  auto* out = static_cast<Bf16*>(y.mutable_data_ptr());
  at::parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
    kernel.gemv_bf16(
        data<Bf16>(weight) + begin * columns, wide.data(), out + begin, end - begin, columns);
  });
  return y;
}

at::Tensor rms_norm_kernel(const at::Tensor& given, const at::Tensor& scale, double eps) {
  const auto x = given.contiguous();
  auto y = at::empty_like(x);
  const auto columns = x.size(-1);
  const auto& kernel = row_kernels();
  at::parallel_for(0, x.numel() / columns, grain(columns), [&](int64_t begin, int64_t end) {
    const auto start = begin * columns;
    if (x.scalar_type() == at::kFloat) {
      kernel.rms_norm_f32(data<float>(x) + start,
                          data<float>(scale),
                          y.mutable_data_ptr<float>() + start,
                          end - begin,
                          columns,
                          eps);
    } else {
      kernel.rms_norm_bf16(data<Bf16>(x) + start,
                           data<Bf16>(scale),
                           static_cast<Bf16*>(y.mutable_data_ptr()) + start,
                           end - begin,
                           columns,
                           eps);
    }
  });
  return y;
}

bool has_fused_norm(const at::Tensor& x) {
  return c10::InferenceMode::is_enabled() && x.is_cuda();
}

at::Tensor rms_norm_fused(const at::Tensor& x, const at::Tensor& scale, double eps) {
  const auto weight = scale.to(at::kFloat).add(1.0);  // of another dtype than x there is no kernel
  return at::rms_norm(x.to(at::kFloat), {x.size(-1)}, weight, eps).to(x.scalar_type());
}

at::Tensor rope_kernel(const at::Tensor& given, const at::Tensor& cos, const at::Tensor& sin) {
  const auto x = given.contiguous();
  auto y = at::empty_like(x);
  const auto T = x.size(2);
  const auto D = x.size(3);
  const auto& kernel = row_kernels();
  const auto* c = cos.const_data_ptr<float>();
  const auto* s = sin.const_data_ptr<float>();
  at::parallel_for(0, x.numel() / D, grain(D), [&](int64_t begin, int64_t end) {
    while (begin < end) {  // rows of one head at a time: their angles stand one after another
      const auto t = begin % T;
      const auto rows = std::min(end - begin, T - t);
      const auto start = begin * D;
      if (x.scalar_type() == at::kFloat) {
        auto* out = y.mutable_data_ptr<float>() + start;
        kernel.rope_f32(data<float>(x) + start, c + t * D, s + t * D, out, rows, D);
      } else {
        auto* out = static_cast<Bf16*>(y.mutable_data_ptr()) + start;
        kernel.rope_bf16(data<Bf16>(x) + start, c + t * D, s + t * D, out, rows, D);
      }
      begin += rows;
    }
  });
  return y;
}

}  // namespace gemma_torch
