// One token, or a few: bound by the bytes of the weights. Each thread keeps a residual of its own, so that threads meet
// only four times a layer: after the queries, keys and values, after attention, and after both products that are cut
// along their columns.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "gemma_torch/engine/fused_state.h"

namespace gemma_torch {
namespace {

using kernels::Bf16;
using kernels::Range;

// y += w x, for the columns of `slices` and the rows of `blocks`.
struct Product {
  const kernels::Packed& w;
  Range slices, blocks;
};

void run(const kernels::FusedKernels& kernel,
         const Product& p,
         const float* x,
         int64_t rows,
         const QuantizedRows& quantized,
         float* y,
         int64_t y_stride) {
  if (p.w.format != kernels::Format::kLossless12) {
    const auto begin = p.slices.begin * p.w.slice;
    const auto count = (p.slices.end - p.slices.begin) * p.w.slice;
    for (int64_t r = 0; r < rows; ++r) {
      kernel.quantize(x + r * p.w.columns + begin, count, quantized.from(r, begin));
    }
  }
  kernel.product(p.w, p.slices, p.blocks, {rows, x, p.w.columns, quantized.views()}, y, y_stride);
}

}  // namespace

void FusedEngine::run_rows(const Pass& pass, float* hidden) {
  clock_.start();
  fill_angles(pass);
  team_.run([&](int i) { rows_worker(pass, hidden, i); });
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
    const auto blocks = team_.share(layer.qkv.blocks(), i);
    for (int64_t r = 0; r < rows; ++r) {
      std::memset(b.qkv.data() + r * layer.qkv.rows + blocks.begin * 16,
                  0,
                  static_cast<size_t>(blocks.end - blocks.begin) * 16 * sizeof(float));
    }
    run(kernel_,
        {layer.qkv, {0, 1}, {blocks.begin, blocks.end}},
        worker.h.data(),
        rows,
        worker.quantized,
        b.qkv.data(),
        layer.qkv.rows);
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

Range FusedEngine::seen_positions(bool full, int64_t b, int64_t position) const {
  auto low = first_[static_cast<size_t>(b)];
  if (!full) {
    low = std::max(low, position - model_->cfg.sliding_window + 1);
  }
  return {std::min(low, position), position + 1};  // itself always, padding too
}

void FusedEngine::store_key_value(
    int64_t layer, int64_t b, int64_t position, float* key, const float* value) {
  const auto& cfg = model_->cfg;
  const bool full = cfg.layer_types[static_cast<size_t>(layer)] == LayerType::kFullAttention;
  auto& cache = cache_.layer(layer);
  const auto D = cfg.head_dim, slots = cache.keys.size(2);
  const auto slot = full ? position : position % cache_.ring();
  for (int64_t g = 0; g < cfg.n_kv_groups; ++g) {
    const auto at = ((b * cfg.n_kv_groups + g) * slots + slot) * D;
    if (cache_.options().dtype == c10::kFloat) {
      std::copy_n(key + g * D, D, static_cast<float*>(cache.keys.mutable_data_ptr()) + at);
      std::copy_n(value + g * D, D, static_cast<float*>(cache.values.mutable_data_ptr()) + at);
    } else {
      kernel_.to_bf16(key + g * D, static_cast<Bf16*>(cache.keys.mutable_data_ptr()) + at, D);
      kernel_.to_bf16(value + g * D, static_cast<Bf16*>(cache.values.mutable_data_ptr()) + at, D);
    }
  }
}

void FusedEngine::row_attention(const Pass& pass, int64_t l, Worker& worker, int i) {
  const auto& cfg = model_->cfg;
  const auto& layer = pack_->layers()[static_cast<size_t>(l)];
  const bool full = cfg.layer_types[static_cast<size_t>(l)] == LayerType::kFullAttention;
  const auto D = cfg.head_dim, H = cfg.n_heads, G = cfg.n_kv_groups, half = D / 2;
  const auto eps = static_cast<float>(cfg.rms_norm_eps);
  const auto scaling = 1.0F / std::sqrt(static_cast<float>(cfg.query_pre_attn_scalar));
  auto& b = *buffers_;
  const auto rows = pass.rows(batch());
  // With one new token a row, its key is seen only by the thread that has the last positions, which stores it. With
  // more, rows are shared out and everyone waits.
  const bool one = pass.T == 1;
  for (int64_t r = 0; r < rows; ++r) {
    const float* const qkv = b.qkv.data() + r * layer.qkv.rows;
    const float* const cos = b.cos[full].data() + r % pass.T * half;
    const float* const sin = b.sin[full].data() + r % pass.T * half;
    float* const q = worker.q.data() + r * H * D;
    for (int64_t h = 0; h < H; ++h) {
      layer.q_norm != nullptr ? kernel_.rms_norm(qkv + h * D, layer.q_norm, q + h * D, D, eps)
                              : static_cast<void>(std::copy_n(qkv + h * D, D, q + h * D));
      kernel_.rope(q + h * D, cos, sin, D);
    }
    for (int64_t j = 0; j < H * D; ++j) {
      q[j] *= scaling;
    }
    if (one ? i == team_.size() - 1 : r % team_.size() == i) {
      float* const k = worker.k.data() + r * G * D;
      for (int64_t g = 0; g < G; ++g) {
        const float* const from = qkv + (H + g) * D;
        layer.k_norm != nullptr ? kernel_.rms_norm(from, layer.k_norm, k + g * D, D, eps)
                                : static_cast<void>(std::copy_n(from, D, k + g * D));
        kernel_.rope(k + g * D, cos, sin, D);
      }
      store_key_value(l, r / pass.T, pass.position + r % pass.T, k, qkv + (H + G) * D);
    }
  }
  if (!one) {
    team_.barrier();
  }
  auto& cache = cache_.layer(l);
  const bool wide = cache_.options().dtype == c10::kFloat;
  const auto slots = cache.keys.size(2), heads = H / G;
  const auto element = static_cast<int64_t>(cache.keys.element_size());
  for (int64_t r = 0; r < rows; ++r) {
    const auto seen = seen_positions(full, r / pass.T, pass.position + r % pass.T);
    const auto share = team_.share(seen.end - seen.begin, i);
    const Range part{seen.begin + share.begin, seen.begin + share.end};
    for (int64_t g = 0; g < G; ++g) {
      const auto offset = (r / pass.T * G + g) * slots * D * element;
      kernels::Seen what{static_cast<const char*>(cache.keys.const_data_ptr()) + offset,
                         static_cast<const char*>(cache.values.const_data_ptr()) + offset,
                         {part, {0, 0}}};
      const auto ring = cache_.ring();
      if (!full && part.end > part.begin) {
        const auto begin = part.begin % ring;
        const auto end = begin + (part.end - part.begin);
        what.slots[0] = {begin, std::min(end, ring)};
        what.slots[1] = {0, std::max<int64_t>(0, end - ring)};
      }
      const auto at = (i * kernels::kMaxRows + r) * H + g * heads;
      (wide ? kernel_.attend_f32 : kernel_.attend_bf16)(
          worker.q.data() + (r * H + g * heads) * D,
          heads,
          D,
          what,
          {b.largest.data() + at, b.sum.data() + at, b.z.data() + at * D});
    }
  }
}

// The columns of z that this thread's slices of out_proj take, from all threads' parts.
void FusedEngine::merge_attention(const Pass& pass, Worker& worker, int i) {
  const auto& cfg = model_->cfg;
  const auto D = cfg.head_dim, H = cfg.n_heads;
  const auto& b = *buffers_;
  const auto slices = team_.share(H * D / kernels::kSliceColumns, i);
  const auto begin = slices.begin * kernels::kSliceColumns,
             end = slices.end * kernels::kSliceColumns;
  for (int64_t r = 0; r < pass.rows(batch()); ++r) {
    for (int64_t j = begin; j < end;) {
      const auto h = j / D;
      const auto stop = std::min(end, (h + 1) * D);
      const auto at = [&](int64_t part) {
        return static_cast<size_t>((part * kernels::kMaxRows + r) * H + h);
      };
      float largest = b.largest[at(0)];
      for (int64_t part = 1; part < team_.size(); ++part) {
        largest = std::max(largest, b.largest[at(part)]);
      }
      float sum = 0;
      float* const z = worker.z.data() + r * H * D;
      std::fill(z + j, z + stop, 0.0F);
      for (int64_t part = 0; part < team_.size(); ++part) {
        const float weight = b.sum[at(part)] > 0 ? std::exp(b.largest[at(part)] - largest) : 0.0F;
        sum += weight * b.sum[at(part)];
        const float* const from = b.z.data() + at(part) * static_cast<size_t>(D) - h * D;
        for (int64_t c = j; weight > 0 && c < stop; ++c) {
          z[c] += weight * from[c];
        }
      }
      for (int64_t c = j; c < stop; ++c) {
        z[c] /= sum;
      }
      j = stop;
    }
  }
}

}  // namespace gemma_torch
