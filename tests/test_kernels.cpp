#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>

#include "gemma_torch/base/error.h"
#include "gemma_torch/base/memory.h"
#include "gemma_torch/kernels/cpu/row_kernels.h"
#include "gemma_torch/model/gemma3.h"
#include "gemma_torch/model/inference.h"
#include "support/catch.h"
#include "support/golden.h"

using namespace gemma_torch;
using namespace gemma_torch::test;
using kernels::Bf16;
using kernels::Isa;

namespace {

constexpr Isa kIsas[] = {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512};

// One rounding to bfloat16 is at most 2^-8 of the value.
double tolerance(at::ScalarType dtype, const at::Tensor& want) {
  return (dtype == at::kFloat ? 1e-6 : 1.0 / 256) * (1 + want.abs().max().item<double>());
}

template <typename T>
const T* data(const at::Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

}  // namespace

TEST_CASE("row products of every instruction set equal float64's, odd sizes too", "[kernels]") {
  at::manual_seed(1);
  for (const auto isa : kIsas) {
    if (!kernels::has_isa(isa)) {
      WARN("skipped: this CPU has no " << kernels::isa_name(isa));
      continue;
    }
    const auto& kernel = kernels::row_kernels(isa);
    CHECK(kernel.isa == isa);
    for (const auto& [rows, columns] : {std::pair{7, 640}, {2, 37}, {1, 5}, {64, 2048}, {3, 16}}) {
      CAPTURE(kernels::isa_name(isa), rows, columns);
      const auto w = at::randn({rows, columns}) / std::sqrt(columns);
      const auto x = at::randn({columns});
      auto y = at::empty({rows});
      kernel.gemv_f32(data<float>(w), data<float>(x), y.mutable_data_ptr<float>(), rows, columns);
      const auto want = w.to(at::kDouble).mv(x.to(at::kDouble));
      CHECK(max_difference(y, want) < tolerance(at::kFloat, want));

      const auto half = w.to(at::kBFloat16);
      auto rounded = at::empty({rows}, at::kBFloat16);
      kernel.gemv_bf16(data<Bf16>(half),
                       data<float>(x),
                       static_cast<Bf16*>(rounded.mutable_data_ptr()),
                       rows,
                       columns);
      const auto wanted = half.to(at::kDouble).mv(x.to(at::kDouble));
      CHECK(max_difference(rounded, wanted) < tolerance(at::kBFloat16, wanted));
    }
  }
}

TEST_CASE("rounding to bfloat16 is PyTorch's, for ties, infinities and NaN", "[kernels]") {
  const auto bits = at::tensor(
      {0x3f808000, 0x3f818000, 0x3f807fff, 0x7f800000, 0x7fc00001, 0x7f7fffff, 0x00000001},
      at::kInt);
  const auto x = bits.view(at::kFloat);
  for (const auto isa : kIsas) {
    if (!kernels::has_isa(isa)) continue;
    auto y = at::empty({7}, at::kBFloat16);
    const auto ones = at::ones({7, 1}, at::kBFloat16);  // y[r] = 1 * x[r]
    for (int64_t r = 0; r < 7; ++r) {
      kernels::row_kernels(isa).gemv_bf16(
          data<Bf16>(ones), data<float>(x) + r, static_cast<Bf16*>(y.mutable_data_ptr()) + r, 1, 1);
    }
    CHECK(at::equal(y.view(at::kShort).narrow(0, 0, 4),
                    x.to(at::kBFloat16).view(at::kShort).narrow(0, 0, 4)));
    CHECK(y[4].isnan().item<bool>());
    CHECK(at::equal(y.narrow(0, 5, 2), x.to(at::kBFloat16).narrow(0, 5, 2)));
  }
}

TEST_CASE("RMSNorm and Linear give the same with kernels and written out", "[kernels]") {
  at::manual_seed(2);
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    CAPTURE(dtype);
    RMSNorm norm(640, /*eps=*/1e-6, at::TensorOptions(dtype));
    Linear linear(640, 1030, at::TensorOptions(dtype));
    at::NoGradGuard no_grad;
    norm->scale.normal_();
    const auto x = (at::randn({2, 3, 640}) * 20).to(dtype);
    const auto row = x.narrow(0, 1, 1).narrow(1, 2, 1);
    const auto norm_want = norm(x);
    const auto row_want = linear(row);
    CHECK_FALSE(has_kernels(x));
    const c10::InferenceMode inference;
    CHECK(has_kernels(x));
    CHECK(is_row_product(row, linear->weight));
    CHECK_FALSE(is_row_product(x, linear->weight));
    CHECK(max_difference(norm(x), norm_want) < tolerance(dtype, norm_want));
    CHECK(max_difference(norm(x.transpose(0, 1)), norm_want.transpose(0, 1)) <
          tolerance(dtype, norm_want));
    CHECK(!has_fused_norm(x));  // on CUDA alone
    const auto fused = rms_norm_fused(x, norm->scale, 1e-6);
    CHECK(fused.scalar_type() == dtype);
    CHECK(max_difference(fused, norm_want) < tolerance(dtype, norm_want));
    CHECK(linear(row).sizes() == row_want.sizes());
    CHECK(max_difference(linear(row), row_want) < tolerance(dtype, row_want));
  }
}

TEST_CASE("RoPE gives the same with kernels and written out", "[kernels]") {
  at::manual_seed(3);
  const auto [cos, sin] = compute_rope_params(at::arange(100, 107), /*head_dim=*/36, 1e4);
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto x =
        at::randn({2, 7, 3, 36}).to(dtype).transpose(1, 2);  // (B, H, T, D), not contiguous
    const auto want = apply_rope(x, cos, sin);
    const c10::InferenceMode inference;
    CHECK(max_difference(apply_rope(x, cos, sin), want) < tolerance(dtype, want));
    CHECK(apply_rope(x, cos, sin).sizes() == want.sizes());
  }
}

TEST_CASE("memory on large pages is zeroed, aligned, and outlives its maker", "[memory]") {
  at::Tensor x;
  {
    const auto made = zeros_on_large_pages({3, 1 << 20}, at::kFloat);
    x = made.narrow(0, 1, 2);
  }
  CHECK(x.count_nonzero().item<int64_t>() == 0);
  CHECK(reinterpret_cast<uintptr_t>(large_pages(10).get()) % (2 << 20) == 0);
  CHECK_THROWS_AS(large_pages(size_t{1} << 60), Error);
}
