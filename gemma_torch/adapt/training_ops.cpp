#include "gemma_torch/adapt/training_ops.h"

#include <ATen/Parallel.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "gemma_torch/base/error.h"
#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/kernels/cpu/row_kernels.h"
#include "gemma_torch/kernels/cpu/training_kernels.h"

namespace gemma_torch {
namespace {

using kernels::Bf16;
using kernels::RowTraining;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr int64_t kNormBlocks =
    16;  // partial sums of a norm's scale: one order for any number of threads

// Rows that are worth a thread of their own: about 32 KiB.
int64_t grain(int64_t columns) {
  return std::max<int64_t>(1, 16'384 / columns);
}

template <typename T>
const RowTraining<T>& row_training() {
  static const auto& kernels = kernels::training_kernels(kernels::best_isa());
  if constexpr (std::is_same_v<T, float>) {
    return kernels.f32;
  } else {
    return kernels.bf16;
  }
}

template <typename T>
const T* data(const at::Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <typename T>
T* mutable_data(const at::Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// body(T{}) with the kernels' type of numbers.
template <typename Body>
void with_type_of(const at::Tensor& x, const Body& body) {
  x.scalar_type() == at::kFloat ? body(float{}) : body(Bf16{});
}

at::Tensor rotated(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const auto T = x.size(1), H = x.size(2), D = x.size(3);
  auto y = at::empty_like(x);
  const auto& kernel = kernels::row_kernels();
  const auto* c = data<float>(cos);
  const auto* s = data<float>(sin);
  at::parallel_for(0, x.size(0) * T, grain(H * D), [&](int64_t begin, int64_t end) {
    for (auto row = begin * H; row < end * H; ++row) {
      const auto angle = row / H % T * D;
      x.scalar_type() == at::kFloat ? kernel.rope_f32(data<float>(x) + row * D,
                                                      c + angle,
                                                      s + angle,
                                                      mutable_data<float>(y) + row * D,
                                                      1,
                                                      D)
                                    : kernel.rope_bf16(data<Bf16>(x) + row * D,
                                                       c + angle,
                                                       s + angle,
                                                       mutable_data<Bf16>(y) + row * D,
                                                       1,
                                                       D);
    }
  });
  return y;
}

struct Norm : Function<Norm> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& given,
                            const at::Tensor& scale,
                            double eps) {
    const auto x = given.contiguous();
    auto y = at::empty_like(x);
    const auto columns = x.size(-1);
    const auto& kernel = kernels::row_kernels();
    at::parallel_for(0, x.numel() / columns, grain(columns), [&](int64_t begin, int64_t end) {
      const auto start = begin * columns, rows = end - begin;
      x.scalar_type() == at::kFloat ? kernel.rms_norm_f32(data<float>(x) + start,
                                                          data<float>(scale),
                                                          mutable_data<float>(y) + start,
                                                          rows,
                                                          columns,
                                                          eps)
                                    : kernel.rms_norm_bf16(data<Bf16>(x) + start,
                                                           data<Bf16>(scale),
                                                           mutable_data<Bf16>(y) + start,
                                                           rows,
                                                           columns,
                                                           eps);
    });
    context->save_for_backward({x, scale});
    context->saved_data["eps"] = eps;
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &scale = saved[1];
    const auto dy = gradients[0].contiguous();
    const auto eps = static_cast<float>(context->saved_data["eps"].toDouble());
    const auto columns = x.size(-1), rows = x.numel() / columns;
    const bool wants_scale = context->needs_input_grad(1);
    auto dx = at::empty_like(x);
    at::Tensor parts;
    if (wants_scale) {
      parts = at::zeros({kNormBlocks, columns}, x.options().dtype(at::kFloat));
    }
    with_type_of(x, [&](auto type) {
      using T = decltype(type);
      at::parallel_for(0, kNormBlocks, 1, [&](int64_t begin, int64_t end) {
        for (auto block = begin; block < end; ++block) {
          const auto first = rows * block / kNormBlocks, last = rows * (block + 1) / kNormBlocks;
          const auto start = first * columns;
          row_training<T>().rms_norm_backward(
              {data<T>(x) + start,
               data<T>(scale),
               data<T>(dy) + start,
               mutable_data<T>(dx) + start,
               wants_scale ? mutable_data<float>(parts) + block * columns : nullptr},
              last - first,
              columns,
              eps);
        }
      });
    });
    return {dx, wants_scale ? parts.sum(/*dim=*/0).to(scale.scalar_type()) : at::Tensor(), {}};
  }
};

struct Rope : Function<Rope> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& x,
                            const at::Tensor& cos,
                            const at::Tensor& sin) {
    context->save_for_backward({cos, sin});
    return rotated(x.contiguous(), cos, sin);
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    return {rotated(gradients[0].contiguous(), saved[0], -saved[1]), {}, {}};  // turned back
  }
};

struct GeluMul : Function<GeluMul> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& g, const at::Tensor& u) {
    const auto gate = g.contiguous(), up = u.contiguous();
    auto y = at::empty_like(gate);
    with_type_of(gate, [&](auto type) {
      using T = decltype(type);
      at::parallel_for(0, gate.numel(), grain(1), [&](int64_t begin, int64_t end) {
        row_training<T>().gelu_mul(
            data<T>(gate) + begin, data<T>(up) + begin, mutable_data<T>(y) + begin, end - begin);
      });
    });
    context->save_for_backward({gate, up});
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const auto &gate = saved[0], &up = saved[1];
    const auto dy = gradients[0].contiguous();
    auto dgate = at::empty_like(gate), dup = at::empty_like(up);
    with_type_of(gate, [&](auto type) {
      using T = decltype(type);
      at::parallel_for(0, gate.numel(), grain(1), [&](int64_t begin, int64_t end) {
        row_training<T>().gelu_mul_backward(data<T>(gate) + begin,
                                            data<T>(up) + begin,
                                            data<T>(dy) + begin,
                                            mutable_data<T>(dgate) + begin,
                                            mutable_data<T>(dup) + begin,
                                            end - begin);
      });
    });
    return {dgate, dup};
  }
};

// (B, T, H, D) -> (B * G, T * H/G, D): the heads of a group's keys stand side by side. Free where there is one group.
at::Tensor by_group(const at::Tensor& x, int64_t groups) {
  const auto B = x.size(0), T = x.size(1), heads = x.size(2) / groups, D = x.size(3);
  return x.reshape({B, T, groups, heads, D}).transpose(1, 2).reshape({B * groups, T * heads, D});
}
at::Tensor by_token(const at::Tensor& x, int64_t B, int64_t T) {  // the way back
  const auto groups = x.size(0) / B, heads = x.size(1) / T, D = x.size(2);
  return x.view({B, groups, T, heads, D}).transpose(1, 2).reshape({B, T, groups * heads, D});
}

struct Attention : Function<Attention> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& q,
                            const at::Tensor& k,
                            const at::Tensor& v,
                            const at::Tensor& oldest,
                            double scale) {
    const auto B = q.size(0), T = q.size(1), G = k.size(2);
    const auto queries = by_group(q, G), keys = by_group(k, G), values = by_group(v, G);
    auto pattern = at::bmm(queries, keys.transpose(1, 2));  // (B * G, T * H/G, T)
    each_row(pattern, oldest, G, [&](auto type, int64_t start, const auto& seen) {
      using T_ = decltype(type);
      row_training<T_>().softmax(
          mutable_data<T_>(pattern) + start, seen, static_cast<float>(scale));
    });
    context->save_for_backward({queries, keys, values, pattern, oldest});
    context->saved_data["scale"] = scale;
    context->saved_data["B"] = B;
    return by_token(at::bmm(pattern, values), B, T);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const auto &q = saved[0], &k = saved[1], &v = saved[2], &pattern = saved[3], &oldest = saved[4];
    const auto scale = static_cast<float>(context->saved_data["scale"].toDouble());
    const auto B = context->saved_data["B"].toInt();
    const auto G = k.size(0) / B, T = k.size(1);
    const auto dz = by_group(gradients[0], G);
    auto slope = at::bmm(dz, v.transpose(1, 2));
    each_row(pattern, oldest, G, [&](auto type, int64_t start, const auto& seen) {
      using T_ = decltype(type);
      row_training<T_>().softmax_backward(
          data<T_>(pattern) + start, mutable_data<T_>(slope) + start, seen, scale);
    });
    return {by_token(at::bmm(slope, k), B, T),
            by_token(at::bmm(slope.transpose(1, 2), q), B, T),
            by_token(at::bmm(pattern.transpose(1, 2), dz), B, T),
            {},
            {}};
  }

 private:
  // body(type, offset of the row, what it sees) for every row of pattern (B * G, T * H/G, T).
  template <typename Body>
  static void each_row(const at::Tensor& pattern,
                       const at::Tensor& oldest,
                       int64_t groups,
                       const Body& body) {
    const auto rows = pattern.size(1), T = pattern.size(2), heads = rows / T;
    const auto* first = data<int64_t>(oldest);
    with_type_of(pattern, [&](auto type) {
      at::parallel_for(0, pattern.size(0) * rows, grain(T), [&](int64_t begin, int64_t end) {
        for (auto row = begin; row < end; ++row) {
          const auto b = oldest.size(0) == 1 ? 0 : row / rows / groups, t = row % rows / heads;
          body(type,
               row * T,
               typename RowTraining<decltype(type)>::Seen{T, first[b * T + t], t + 1});
        }
      });
    });
  }
};

}  // namespace

bool has_training_kernels(const at::Tensor& x) {
  return x.device().is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
}

at::Tensor norm_op(const at::Tensor& x, const at::Tensor& scale, double eps) {
  return Norm::apply(x, scale, eps);
}

at::Tensor rope_op(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  return Rope::apply(x, cos, sin);
}

at::Tensor gelu_mul_op(const at::Tensor& gate, const at::Tensor& up) {
  return GeluMul::apply(gate, up);
}

at::Tensor attention_op(const at::Tensor& q,
                        const at::Tensor& k,
                        const at::Tensor& v,
                        const at::Tensor& oldest,
                        double scale) {
  check(oldest.dim() == 2 && oldest.size(1) == q.size(1) && oldest.is_contiguous(),
        "[attention_op] oldest: expected ({} or 1, {}), got {}",
        q.size(0),
        q.size(1),
        shape_str(oldest.sizes()));
  return Attention::apply(q, k, v, oldest, scale);
}

}  // namespace gemma_torch
