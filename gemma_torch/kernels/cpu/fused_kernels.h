#pragma once

#include <cstdint>

#include "gemma_torch/kernels/cpu/isa.h"
#include "gemma_torch/kernels/cpu/packed.h"

namespace gemma_torch::kernels {

/// Rows of activations in 16 bits, for products with codes: x[j] = values[j] * scales[j / 32], to within half of
/// scales[j / 32]. values = 256 high + low.
struct QuantizedRow {
  int8_t* high;    // (columns)
  int8_t* low;     // (columns)
  int16_t* pairs;  // (columns) values, each four in the order 0, 2, 1, 3
  int32_t* sums;   // (columns / 32) of values
  float* scales;   // (columns / 32)
};

/// Up to kMaxRows rows that a product takes at once.
struct Rows {
  int64_t count;
  const float* x;                 // (count, columns), for kLossless12
  int64_t stride;                 // floats from row to row
  const QuantizedRow* quantized;  // (count), for kIntN
};
constexpr int64_t kMaxRows = 8;

struct Range {
  int64_t begin, end;
};

/// Keys and values of one row and one group, and which of them a query sees.
struct Seen {
  const void* pairs;  // (slots, 2, D) float32 or bfloat16, a key and its value
  Range slots[2];     // those seen, in up to two runs
};

/// What attention to a part of the keys gives, to be merged: for each query head the largest score, the sum of
/// e^(score - largest), and the sum of values so weighted. Keys and values in bfloat16 meet queries and weights
/// rounded to bfloat16, in float32 sums; the sum of weights is that of the rounded ones.
struct Partial {
  float* largest;  // (heads)
  float* sum;      // (heads)
  float* z;        // (heads, D)
};

/// The scan of the output head, and rho_a, rho_b and sigma of its residuals: see head_scan.h.
struct HeadScan;
struct ScanInput;
enum class ScanPart : uint8_t { kMajor, kMinor, kFiner };
constexpr size_t kScanParts = 3;

/// c (32, 32) = or += a (32, k) times two panels of 16 columns. k is a multiple of 32. A thread calls begin() before
/// its products and end() after them.
struct Gemm {
  void (*begin)();
  void (*end)();
  void (*bf16)(const Bf16* a,
               int64_t a_stride,
               const Bf16* const panels[2],
               int64_t k,
               float* c,
               int64_t c_stride,
               bool add);
  void (*f32)(const float* a,
              int64_t a_stride,
              const float* const panels[2],
              int64_t k,
              float* c,
              int64_t c_stride,
              bool add);
};

constexpr int64_t kMaxHeadDim = 512;

/// Queries, and keys and values as panels.
template <typename T>
struct QueryTile {
  const T* q;  // (32, D), scaled; rows past `rows` are zeros
  int64_t rows;
  int64_t D;                    // a multiple of 32, at most kMaxHeadDim
  const T* key_panels;          // (keys / 16, D / 2, 16, 2), or (keys / 16, D, 16) in float32
  const T* value_panels;        // (D / 16, keys / 2, 16, 2), or (D / 16, keys, 16)
  int64_t keys;                 // a multiple of 32
  int32_t first[32], last[32];  // the keys a row sees
};

/// Rows of D numbers are `stride` numbers apart.
template <typename T, typename S>
struct KeyValuePanels {
  void (*key)(const S* rows, int64_t stride, int64_t count, int64_t D, T* panel);
  void (*values)(const S* rows, int64_t stride, int64_t count, int64_t D, int64_t keys, T* panels);
};

/// Kernels of the fused engine, for one instruction set. Everything is float32 but what is said to be otherwise. None
/// allocates, none starts threads.
struct FusedKernels {
  Isa isa;

  // ---- one token, or up to kMaxRows
  /// y[m, r] += sum over the columns of `slices` of w[r, j] x[m, j], for the rows of `blocks`.
  void (*product)(
      const Packed& w, Range slices, Range blocks, const Rows& x, float* y, int64_t y_stride);
  /// n, a multiple of 32, numbers to 16 bits.
  void (*quantize)(const float* x, int64_t n, const QuantizedRow& out);
  /// y = x / rms(x) * scale; `scale` is 1 + the norm's weight.
  void (*rms_norm)(const float* x, const float* scale, float* y, int64_t n, float eps);
  /// Rotates one head in place: pairs (j, j + n/2); cos and sin have n/2 entries.
  void (*rope)(float* x, const float* cos, const float* sin, int64_t n);
  /// y[j] = gelu(gate) * up, 16 gates and their 16 ups by turns in gate_up (2n).
  void (*gelu_mul)(const float* gate_up, float* y, int64_t n);
  void (*to_bf16)(const float* x, Bf16* y, int64_t n);
  void (*from_bf16)(const Bf16* x, float* y, int64_t n);
  /// Attention of `heads` queries (heads, D) to what is seen. D is a multiple of 32, at most kMaxHeadDim.
  void (*attend_f32)(
      const float* q, int64_t heads, int64_t D, const Seen& seen, const Partial& out);
  void (*attend_bf16)(
      const float* q, int64_t heads, int64_t D, const Seen& seen, const Partial& out);

  // ---- the output head
  /// y[i] = sum of table[id, j] x[j], id = ids[i], or first + i without ids; always summed in the same order.
  void (*dot_rows)(const Bf16* table,
                   const int32_t* ids,
                   int64_t first,
                   int64_t count,
                   const float* x,
                   int64_t columns,
                   float* y);
  void (*scan)(
      const HeadScan& head, Range blocks, const ScanInput& x, float* upper, float* block_upper);
  /// Brings the bounds of some rows nearer, by one part of their residuals: upper[i] is that of row ids[i] before and
  /// after. Parts follow each other; kFiner makes bounds of those that kMajor and kMinor gave.
  void (*refine)(const HeadScan& head,
                 ScanPart part,
                 const int32_t* ids,
                 int64_t count,
                 const ScanInput& x,
                 float* upper);
  /// Encodes 16 rows of W (null: zeros) as a block of the scan, and their rows of both tables of residuals; returns the
  /// largest norm among them. `scratch` has 5 * columns floats.
  float (*encode_scan)(const Bf16* const* rows,
                       const int32_t* order,
                       int64_t columns,
                       uint8_t* block,
                       uint8_t* major_residuals,
                       uint8_t* other_residuals,
                       float* scratch);
  /// Whether rows of a block reach `threshold`: writes the indices of blocks that do, returns how many. `found` has room
  /// for all and 16.
  int64_t (*reach)(const float* block_upper, Range blocks, float threshold, int32_t* found);
  /// The rows of those blocks that do, in order, and their bounds; returns how many, or ends soon after `most` of them.
  /// rows and bounds have room for `most` + 16.
  int64_t (*reach_rows)(const float* upper,
                        const int32_t* blocks,
                        int64_t count,
                        float threshold,
                        int64_t most,
                        int32_t* rows,
                        float* bounds);

  // ---- many tokens: products of 32 rows and 32 columns
  /// A block of 16 rows of w as a panel (columns / 2, 16, 2) bfloat16, or (columns, 16) float32.
  void (*panel_bf16)(const Packed& w, int64_t block, Bf16* panel);
  void (*panel_f32)(const Packed& w, int64_t block, float* panel);
  Gemm gemm;
  /// y (32, 16) = gelu(gates) * ups of gate_up (32, 32): 16 gates, then their 16 ups.
  void (*gelu_tile_bf16)(const float* gate_up, Bf16* y, int64_t y_stride);
  void (*gelu_tile_f32)(const float* gate_up, float* y, int64_t y_stride);
  bool fast_bf16;  // whether gemm.bf16 is faster than gemm.f32
  /// Attention of up to 32 rows of queries; out[r * out_stride ..] = z of row r.
  void (*attend_tile_bf16)(const QueryTile<Bf16>& tile,
                           const Gemm& how,
                           Bf16* out,
                           int64_t out_stride);
  void (*attend_tile_f32)(const QueryTile<float>& tile,
                          const Gemm& how,
                          float* out,
                          int64_t out_stride);
  /// 16 keys, of which `count` are there, as a panel for attend_tile; 32 values to their place in its panels.
  KeyValuePanels<Bf16, Bf16> panels_bf16_bf16;
  KeyValuePanels<Bf16, float> panels_bf16_f32;  // from a float32 cache
  KeyValuePanels<float, Bf16> panels_f32_bf16;
  KeyValuePanels<float, float> panels_f32_f32;
};

/// Those of one instruction set. The caller sees to it that has_isa(isa).
const FusedKernels& fused_kernels(Isa isa);

}  // namespace gemma_torch::kernels
