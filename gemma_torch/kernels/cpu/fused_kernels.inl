// The table of fused_kernels.h for one instruction set. Each fused_kernels_{..}.cpp includes this file under its own
// namespace and is compiled for its own instruction set.

// clang-format off: each needs what the ones before define
#include "gemma_torch/kernels/cpu/lanes.h"
#include "gemma_torch/kernels/cpu/products.inl"
#include "gemma_torch/kernels/cpu/rows.inl"
#include "gemma_torch/kernels/cpu/attention.inl"
#include "gemma_torch/kernels/cpu/head.inl"
#include "gemma_torch/kernels/cpu/encode_scan.inl"
#include "gemma_torch/kernels/cpu/panels.inl"
#include "gemma_torch/kernels/cpu/attention_tile.inl"
// clang-format on

namespace gemma_torch::kernels::GEMMA_TORCH_ISA {

extern const FusedKernels kFusedKernels;
const FusedKernels kFusedKernels = {
    .isa = GEMMA_TORCH_ISA_VALUE,
    .product = product,
    .quantize = quantize,
    .rms_norm = rms_norm,
    .rope = rope,
    .gelu_mul = gelu_mul,
    .to_bf16 = narrow_row,
    .from_bf16 = widen_row,
    .attend_f32 = attend<float>,
    .attend_bf16 = attend<Bf16>,
    .dot_rows = dot_rows,
    .scan = scan,
    .refine = refine,
    .encode_scan = encode_scan,
    .reach = reach,
    .reach_rows = reach_rows,
    .panel_bf16 = panel_of<Bf16>,
    .panel_f32 = panel_of<float>,
    .gemm = {nothing, nothing, gemm_bf16, gemm_f32},
    .gelu_tile_bf16 = gelu_tile<Bf16>,
    .gelu_tile_f32 = gelu_tile<float>,
    .fast_bf16 = kFastBf16,
    .attend_tile_bf16 = attend_tile<Bf16>,
    .attend_tile_f32 = attend_tile<float>,
    .panels_bf16_bf16 = {key_panel<Bf16, Bf16>, value_panels<Bf16, Bf16>},
    .panels_bf16_f32 = {key_panel<Bf16, float>, value_panels<Bf16, float>},
    .panels_f32_bf16 = {key_panel<float, Bf16>, value_panels<float, Bf16>},
    .panels_f32_f32 = {key_panel<float, float>, value_panels<float, float>},
};

}  // namespace gemma_torch::kernels::GEMMA_TORCH_ISA
