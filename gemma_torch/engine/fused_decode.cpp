// One token, or a few: bound by the bytes of the weights. Each thread keeps a residual of its own, so that threads meet
// only four times a layer: after the queries, keys and values, after attention, and after both products that are cut
// along their columns.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "gemma_torch/engine/fused_state.h"

namespace gemma_torch {
namespace {

using kernels::Range;

// y += w x, for the columns of `slices` and the rows of `blocks`.
struct Product {
  const kernels::Packed& w;
  Range slices, blocks;
};

// The columns of `slices` as products with w take them.
void prepare(const kernels::FusedKernels& kernel,
             const kernels::Packed& w,
             Range slices,
             const float* x,
             int64_t rows,
             const QuantizedRows& quantized) {
  if (w.format != kernels::Format::kLossless12) {
    const auto begin = slices.begin * w.slice;
    const auto count = (slices.end - slices.begin) * w.slice;
    for (int64_t r = 0; r < rows; ++r) {
      kernel.quantize(x + r * w.columns + begin, count, quantized.from(r, begin));
    }
  }
}

void run(const kernels::FusedKernels& kernel,
         const Product& p,
         const float* x,
         int64_t rows,
         const QuantizedRows& quantized,
         float* y,
         int64_t y_stride) {
  prepare(kernel, p.w, p.slices, x, rows, quantized);
  kernel.product(p.w, p.slices, p.blocks, {rows, x, p.w.columns, quantized.views()}, y, y_stride);
}

}  // namespace

void FusedEngine::run_rows(const Pass& pass, float* hidden) {
  clock_.start();
  team_.run([&](int i) {
    fill_angles(pass, i);
    rows_worker(pass, hidden, i);
  });
}

void FusedEngine::rows_worker(const Pass& pass, float* hidden, int i) {
  const auto& cfg = model_->cfg;
  const auto rows = pass.rows(batch());
  const auto E = cfg.emb_dim, F = cfg.hidden_dim;
  const auto eps = static_cast<float>(cfg.rms_norm_eps);
  auto& b = *buffers_;
  auto& worker = b.workers[static_cast<size_t>(i)];
  float* const out_part = b.out_parts.data() + i * kernels::kMaxRows * E;
  float* const down_part = b.down_parts.data() + i * kernels::kMaxRows * E;
  const auto lap = [&](const char* kernel) {
    if (i == 0) {
      clock_.lap(kernel);
    }
  };
  for (int64_t r = 0; r < rows; ++r) {
    embed(pass, r, worker.x.data() + r * E);
  }
  lap("embedding, angles");
  const auto units = team_.share(F / kernels::kSliceColumns, i);  // 64 of the hidden ones
  for (int64_t l = 0; l < cfg.n_layers; ++l) {
    const auto& layer = pack_->layers()[static_cast<size_t>(l)];
    const auto norm = [&](const float* scale) {
      for (int64_t r = 0; r < rows; ++r) {
        kernel_.rms_norm(worker.x.data() + r * E, scale, worker.h.data() + r * E, E, eps);
      }
    };
    norm(layer.input_norm);
    multiply_qkv(layer, rows, worker, i);
    team_.barrier();
    lap("qkv");

    row_attention(pass, l, worker, i);
    team_.barrier();
    lap("attention");

    merge_attention(pass, worker, i);
    const auto z_slices = team_.share(layer.out.slices(), i);
    std::memset(out_part, 0, static_cast<size_t>(rows * E) * sizeof(float));
    run(kernel_,
        {layer.out, {z_slices.begin, z_slices.end}, {0, layer.out.blocks()}},
        worker.z.data(),
        rows,
        worker.quantized,
        out_part,
        E);
    team_.barrier();
    lap("out_proj");

    sum_parts(b.out_parts, rows, layer.post_attn_norm, worker);
    norm(layer.pre_ff_norm);
    const auto width = (units.end - units.begin) * kernels::kSliceColumns;
    std::fill_n(worker.gate_up.data(), rows * 2 * F, 0.0F);
    run(kernel_,
        {layer.gate_up, {0, 1}, {units.begin * 8, units.end * 8}},
        worker.h.data(),
        rows,
        worker.quantized,
        worker.gate_up.data(),
        2 * F);
    for (int64_t r = 0; r < rows; ++r) {
      const auto first = units.begin * kernels::kSliceColumns;
      kernel_.gelu_mul(
          worker.gate_up.data() + r * 2 * F + 2 * first, worker.act.data() + r * F + first, width);
    }
    lap("norms, gate, up, gelu");
    std::memset(down_part, 0, static_cast<size_t>(rows * E) * sizeof(float));
    run(kernel_,
        {layer.down, {units.begin, units.end}, {0, layer.down.blocks()}},
        worker.act.data(),
        rows,
        worker.quantized,
        down_part,
        E);
    team_.barrier();
    lap("down");
    sum_parts(b.down_parts, rows, layer.post_ff_norm, worker);
  }
  if (i == 0) {
    std::copy_n(worker.x.data(), rows * E, hidden);
  }
}

// A thread's share of the rows of queries, of keys and of values: of each, so that all threads read as many bytes,
// whatever their formats, and take as much from each other.
void FusedEngine::multiply_qkv(const LayerPack& layer, int64_t rows, Worker& worker, int i) {
  const auto width = qkv_width();
  prepare(kernel_, layer.qkv[0], {0, 1}, worker.h.data(), rows, worker.quantized);
  float* y = buffers_->qkv.data();
  for (const auto& w : layer.qkv) {
    const auto own = team_.share(w.blocks(), i);
    for (int64_t r = 0; r < rows; ++r) {
      std::fill(y + r * width + own.begin * kernels::kBlockRows,
                y + r * width + own.end * kernels::kBlockRows,
                0.0F);
    }
    kernel_.product(w,
                    {0, 1},
                    {own.begin, own.end},
                    {rows, worker.h.data(), w.columns, worker.quantized.views()},
                    y,
                    width);
    y += w.rows;
  }
}

// x += norm(the sum of all threads' parts): every thread does it, in the same order, for itself.
void FusedEngine::sum_parts(const std::vector<float>& parts,
                            int64_t rows,
                            const float* norm,
                            Worker& worker) {
  const auto E = model_->cfg.emb_dim;
  for (int64_t r = 0; r < rows; ++r) {
    float* const h = worker.h.data() + r * E;
    std::copy_n(parts.data() + r * E, E, h);
    for (int64_t other = 1; other < team_.size(); ++other) {
      const float* const part = parts.data() + (other * kernels::kMaxRows + r) * E;
      for (int64_t j = 0; j < E; ++j) {
        h[j] += part[j];
      }
    }
    kernel_.rms_norm(h, norm, h, E, static_cast<float>(model_->cfg.rms_norm_eps));
    float* const x = worker.x.data() + r * E;
    for (int64_t j = 0; j < E; ++j) {
      x[j] += h[j];
    }
  }
}

}  // namespace gemma_torch
