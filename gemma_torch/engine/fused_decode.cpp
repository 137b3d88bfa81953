// One token, or a few: bound by the bytes of the weights. Each thread keeps a residual of its own, so that threads meet
// only four times a layer: after the queries, keys and values, after attention, and after both products that are cut
// along their columns.

#include <algorithm>
#include <cmath>

#include "gemma_torch/engine/fused_state.h"

namespace gemma_torch {
namespace {

// Makes rows of activations what products with w take: as they are, or in 16 bits.
void prepare(const kernels::FusedKernels& kernel,
             const kernels::Packed& w,
             const kernels::Rows& x) {
  if (w.format != kernels::Format::kLossless12) {
    for (int64_t r = 0; r < x.count; ++r) {
      kernel.quantize(x.x + r * x.stride, w.columns, x.quantized[r]);
    }
  }
}

// y = w x, for prepared rows.
void multiply(const kernels::FusedKernels& kernel,
              const kernels::Packed& w,
              const kernels::Rows& x,
              float* y,
              int64_t y_stride) {
  for (int64_t r = 0; r < x.count; ++r) {
    std::fill_n(y + r * y_stride, w.rows, 0.0F);
  }
  kernel.product(w, {0, w.slices()}, {0, w.blocks()}, x, y, y_stride);
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
  const auto prepared = [&](const kernels::Packed& w, const float* x, int64_t stride) {
    const kernels::Rows all{rows, x, stride, worker.quantized.views()};
    prepare(kernel_, w, all);
    return all;
  };
  const auto lap = [&](const char* kernel) {
    if (i == 0) {
      clock_.lap(kernel);
    }
  };
  for (int64_t r = 0; r < rows; ++r) {
    embed(pass, r, worker.x.data() + r * E);
  }
  lap("embedding, angles");
  const auto part = static_cast<size_t>(i);
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

    const auto& out = layer.out.parts[part];
    const auto z = layer.out.begin[part];
    merge_attention(pass, {z, layer.out.begin[part + 1]}, worker);
    const auto heads = prepared(out, worker.z.data() + z, layer.out.columns);
    multiply(kernel_, out, heads, worker.out_part.data(), E);
    team_.barrier();
    lap("out_proj");

    sum_parts(&Worker::out_part, rows, layer.post_attn_norm, worker);
    norm(layer.pre_ff_norm);
    // Its gates and ups stay with the thread, for its columns of fc3.
    const auto& gate_up = layer.gate_up.parts[part];
    const auto& down = layer.down.parts[part];
    multiply(kernel_, gate_up, prepared(gate_up, worker.h.data(), E), worker.gate_up.data(), 2 * F);
    for (int64_t r = 0; r < rows; ++r) {
      kernel_.gelu_mul(worker.gate_up.data() + r * 2 * F, worker.act.data() + r * F, down.columns);
    }
    lap("norms, gate, up, gelu");
    multiply(kernel_, down, prepared(down, worker.act.data(), F), worker.down_part.data(), E);
    team_.barrier();
    lap("down");
    sum_parts(&Worker::down_part, rows, layer.post_ff_norm, worker);
  }
  if (i == 0) {
    std::copy_n(worker.x.data(), rows * E, hidden);
  }
}

// A thread's part of the rows of queries, of keys and of values: of each, so that all threads read as many bytes,
// whatever their formats, and take as much from each other.
void FusedEngine::multiply_qkv(const LayerPack& layer, int64_t rows, Worker& worker, int i) {
  const auto part = static_cast<size_t>(i);
  const kernels::Rows x{rows, worker.h.data(), model_->cfg.emb_dim, worker.quantized.views()};
  prepare(kernel_, layer.qkv[0].parts[part], x);
  float* y = worker.qkv_part.data();
  for (const auto& w : layer.qkv) {
    multiply(kernel_, w.parts[part], x, y + w.begin[part], qkv_width());
    y += w.rows;
  }
}

// x += norm(the sum of all threads' parts): every thread does it, in the same order, for itself.
void FusedEngine::sum_parts(std::span<float> Worker::* part,
                            int64_t rows,
                            const float* norm,
                            Worker& worker) {
  const auto E = model_->cfg.emb_dim;
  const auto& workers = buffers_->workers;
  for (int64_t r = 0; r < rows; ++r) {
    float* const h = worker.h.data() + r * E;
    std::copy_n((workers[0].*part).data() + r * E, E, h);
    for (size_t other = 1; other < workers.size(); ++other) {
      const float* const from = (workers[other].*part).data() + r * E;
      for (int64_t j = 0; j < E; ++j) {
        h[j] += from[j];
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
