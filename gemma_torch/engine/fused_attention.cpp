// Attention of both kinds of pass: what goes into the cache, what a query sees of it, and how the work is cut: by keys
// for a few tokens, by tiles of queries for many.

#include <algorithm>
#include <cmath>

#include "gemma_torch/engine/fused_chunk.h"

namespace gemma_torch {

using kernels::Bf16;
using kernels::QueryTile;
using kernels::Range;

bool FusedEngine::is_full(int64_t layer) const {
  return model_->cfg.layer_types[static_cast<size_t>(layer)] == LayerType::kFullAttention;
}

// `count` heads of token t of the pass, normalised and rotated.
void FusedEngine::make_heads(
    int64_t l, int64_t t, const float* from, const float* norm, int64_t count, float* to) const {
  const auto D = model_->cfg.head_dim;
  const bool full = is_full(l);
  const float* const cos = buffers_->cos[full].data() + t * D / 2;
  const float* const sin = buffers_->sin[full].data() + t * D / 2;
  for (int64_t h = 0; h < count; ++h, from += D, to += D) {
    if (norm != nullptr) {
      kernel_.rms_norm(from, norm, to, D, static_cast<float>(model_->cfg.rms_norm_eps));
    } else {
      std::copy_n(from, D, to);
    }
    kernel_.rope(to, cos, sin, D);
  }
}

void FusedEngine::make_queries(int64_t l, int64_t t, const float* qkv, float* q) const {
  const auto& cfg = model_->cfg;
  const auto scaling = 1.0F / std::sqrt(static_cast<float>(cfg.query_pre_attn_scalar));
  make_heads(l, t, qkv, pack_->layers()[static_cast<size_t>(l)].q_norm, cfg.n_heads, q);
  for (int64_t j = 0; j < cfg.n_heads * cfg.head_dim; ++j) {
    q[j] *= scaling;
  }
}

void FusedEngine::make_keys(int64_t l, int64_t t, const float* qkv, float* k) const {
  const auto& cfg = model_->cfg;
  make_heads(l,
             t,
             qkv + cfg.n_heads * cfg.head_dim,
             pack_->layers()[static_cast<size_t>(l)].k_norm,
             cfg.n_kv_groups,
             k);
}

Range FusedEngine::seen_positions(bool full, int64_t b, int64_t position) const {
  auto low = first_[static_cast<size_t>(b)];
  if (!full) {
    low = std::max(low, position - model_->cfg.sliding_window + 1);
  }
  return {std::min(low, position), position + 1};  // itself always, padding too
}

// Where the keys and values of one row and group (`owner`, of (B, G)) stand from a slot on: (.., 2, D).
void* FusedEngine::pairs_of(int64_t layer, int64_t owner, int64_t slot) {
  const auto& pairs = cache_.layer(layer).pairs;  // (B, G, slots, 2, D)
  const auto element = static_cast<int64_t>(pairs.element_size());
  return static_cast<char*>(pairs.mutable_data_ptr()) +
         (owner * pairs.stride(1) + slot * pairs.stride(2)) * element;
}

void FusedEngine::store_key_value(
    int64_t layer, int64_t b, int64_t position, const float* key, const float* value) {
  const auto& cfg = model_->cfg;
  const bool full = is_full(layer);
  const auto D = cfg.head_dim;
  const auto slot = full ? position : position % cache_.ring();
  for (int64_t g = 0; g < cfg.n_kv_groups; ++g, key += D, value += D) {
    void* const pair = pairs_of(layer, b * cfg.n_kv_groups + g, slot);
    if (cache_.options().dtype == c10::kFloat) {
      auto* const to = static_cast<float*>(pair);
      std::copy_n(key, D, to);
      std::copy_n(value, D, to + D);
    } else {
      auto* const to = static_cast<Bf16*>(pair);
      kernel_.to_bf16(key, to, D);
      kernel_.to_bf16(value, to + D, D);
    }
  }
}

// Queries of one row, and keys and values if they are wanted, from what each thread made of them.
const float* FusedEngine::gather_qkv(int64_t l, int64_t r, bool keys, Worker& worker) {
  const auto& layer = pack_->layers()[static_cast<size_t>(l)];
  int64_t first = 0;
  for (size_t n = 0; n < (keys ? layer.qkv.size() : 1); ++n) {
    const auto& w = layer.qkv[n];
    for (size_t part = 0; part < w.parts.size(); ++part) {
      const float* const from = buffers_->workers[part].qkv_part.data() + r * qkv_width();
      std::copy(from + first + w.begin[part],
                from + first + w.begin[part + 1],
                worker.qkv.data() + first + w.begin[part]);
    }
    first += w.rows;
  }
  return worker.qkv.data();
}

void FusedEngine::row_attention(const Pass& pass, int64_t l, Worker& worker, int i) {
  const auto& cfg = model_->cfg;
  const bool full = is_full(l);
  const auto D = cfg.head_dim, H = cfg.n_heads, G = cfg.n_kv_groups;
  const auto rows = pass.rows(batch());
  // With one new token a row, its key is seen only by the thread that has the last positions, which stores it. With
  // more, rows are shared out and everyone waits.
  const bool one = pass.T == 1;
  for (int64_t r = 0; r < rows; ++r) {
    const bool keys = one ? i == team_.size() - 1 : r % team_.size() == i;
    const float* const qkv = gather_qkv(l, r, keys, worker);
    make_queries(l, r % pass.T, qkv, worker.q.data() + r * H * D);
    if (keys) {
      float* const k = worker.k.data() + r * G * D;
      make_keys(l, r % pass.T, qkv, k);
      store_key_value(l, r / pass.T, pass.position + r % pass.T, k, qkv + (H + G) * D);
    }
  }
  if (!one) {
    team_.barrier();
  }
  const bool wide = cache_.options().dtype == c10::kFloat;
  const auto heads = H / G;
  for (int64_t r = 0; r < rows; ++r) {
    const auto seen = seen_positions(full, r / pass.T, pass.position + r % pass.T);
    const auto share = team_.share(seen.end - seen.begin, i);
    const Range part{seen.begin + share.begin, seen.begin + share.end};
    for (int64_t g = 0; g < G; ++g) {
      kernels::Seen what{pairs_of(l, r / pass.T * G + g, 0), {part, {0, 0}}};
      const auto ring = cache_.ring();
      if (!full && part.end > part.begin) {
        const auto begin = part.begin % ring;
        const auto end = begin + (part.end - part.begin);
        what.slots[0] = {begin, std::min(end, ring)};
        what.slots[1] = {0, std::max<int64_t>(0, end - ring)};
      }
      const auto at = r * H + g * heads;
      (wide ? kernel_.attend_f32 : kernel_.attend_bf16)(worker.q.data() + (r * H + g * heads) * D,
                                                        heads,
                                                        D,
                                                        what,
                                                        {worker.largest_part.data() + at,
                                                         worker.sum_part.data() + at,
                                                         worker.z_part.data() + at * D});
    }
  }
}

// Some columns of z, those that this thread's part of out_proj takes, from all threads' parts.
void FusedEngine::merge_attention(const Pass& pass, Range columns, Worker& worker) {
  const auto& cfg = model_->cfg;
  const auto D = cfg.head_dim, H = cfg.n_heads;
  const auto& workers = buffers_->workers;
  for (int64_t r = 0; r < pass.rows(batch()); ++r) {
    for (int64_t j = columns.begin; j < columns.end;) {
      const auto h = j / D;
      const auto stop = std::min(columns.end, (h + 1) * D);
      const auto at = static_cast<size_t>(r * H + h);
      float largest = workers[0].largest_part[at];
      for (const auto& w : workers) {
        largest = std::max(largest, w.largest_part[at]);
      }
      float sum = 0;
      float* const z = worker.z.data() + r * H * D;
      std::fill(z + j, z + stop, 0.0F);
      for (const auto& w : workers) {
        const float weight = w.sum_part[at] > 0 ? std::exp(w.largest_part[at] - largest) : 0.0F;
        sum += weight * w.sum_part[at];
        const float* const from = w.z_part.data() + r * H * D;
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

// ---- many tokens

FusedEngine::KeySpan FusedEngine::key_span(const Pass& pass, bool full) const {
  int64_t low = pass.position;
  for (int64_t b = 0; b < batch(); ++b) {
    low = std::min(low, seen_positions(full, b, pass.position).begin);
  }
  const auto count = pass.position + pass.T - low;
  return {low, count, up(count, kTile)};
}

// Normalises, rotates and stores one token's queries, keys and values.
template <typename T>
void FusedEngine::place_token(const Pass& pass, int64_t l, int64_t row, Chunk<T>& chunk, int i) {
  const auto& cfg = model_->cfg;
  const auto D = cfg.head_dim, H = cfg.n_heads, G = cfg.n_kv_groups, t = row % pass.T;
  const float* const qkv = chunk.qkv.data() + row * qkv_width();
  float* const heads = chunk.scratch[static_cast<size_t>(i)].c.data();
  make_queries(l, t, qkv, heads);
  make_keys(l, t, qkv, heads + H * D);
  Typed<T>::put(kernel_, heads, chunk.q.data() + row * H * D, H * D);
  store_key_value(l, row / pass.T, pass.position + t, heads + H * D, qkv + (H + G) * D);
}

// 32 keys and values of one row and group as panels; keys are counted from `low` on.
template <typename T>
void FusedEngine::make_panels(int64_t l, const KeySpan& span, int64_t unit, Chunk<T>& chunk) {
  const auto& cfg = model_->cfg;
  const bool full = is_full(l);
  const auto D = cfg.head_dim;
  const auto tiles = span.padded / kTile;
  const auto owner = unit / tiles, first = unit % tiles * kTile;  // of (B, G); within the span
  T* const key_panels = chunk.key_panels.data() + owner * span.padded * D;
  T* const value_panels = chunk.value_panels.data() + owner * span.padded * D;
  const auto copy = [&](auto zero) {
    using S = decltype(zero);
    const auto& panels = Typed<T>::panels(kernel_, zero);
    const auto count = std::clamp<int64_t>(span.count - first, 0, kTile);
    const auto slot = full ? span.low + first : (span.low + first) % cache_.ring();
    const auto pairs_at = [&](int64_t n) { return static_cast<const S*>(pairs_of(l, owner, n)); };
    const S* keys = pairs_at(slot);
    std::vector<S> unwrapped;                     // rarely needed: twice a layer at most
    if (!full && slot + count > cache_.ring()) {  // the ring's end is within: lay it straight
      unwrapped.resize(static_cast<size_t>(2 * kTile * D));
      for (int64_t n = 0; n < count; ++n) {
        std::copy_n(pairs_at((slot + n) % cache_.ring()), 2 * D, unwrapped.data() + n * 2 * D);
      }
      keys = unwrapped.data();
    }
    const auto some = std::min<int64_t>(count, 16);
    panels.key(keys, 2 * D, some, D, key_panels + first * D);
    panels.key(keys + 16 * 2 * D, 2 * D, count - some, D, key_panels + (first + 16) * D);
    panels.values(keys + D, 2 * D, count, D, span.padded, value_panels + first * 16);
  };
  cache_.options().dtype == c10::kFloat ? copy(0.0F) : copy(Bf16{});
}

// Attention of one tile of queries: some tokens of one row of the batch, all heads of one group.
template <typename T>
void FusedEngine::attend_unit(
    const Pass& pass, int64_t l, const KeySpan& span, int64_t unit, Chunk<T>& chunk, int i) {
  const auto& cfg = model_->cfg;
  const bool full = is_full(l);
  const auto D = cfg.head_dim, H = cfg.n_heads, G = cfg.n_kv_groups, heads = H / G;
  const auto tokens = kTile / heads;
  const auto tiles = (pass.T + tokens - 1) / tokens;
  const auto owner = unit / tiles, b = owner / G, g = owner % G;
  const auto first = unit % tiles * tokens;
  const auto count = std::min(tokens, pass.T - first);
  auto& q = chunk.scratch[static_cast<size_t>(i)].q;
  QueryTile<T> tile{};
  tile.q = q.data();
  tile.rows = count * heads;
  tile.D = D;
  tile.key_panels = chunk.key_panels.data() + owner * span.padded * D;
  tile.value_panels = chunk.value_panels.data() + owner * span.padded * D;
  tile.keys = span.padded;
  for (int64_t n = 0; n < count; ++n) {
    const auto row = b * pass.T + first + n;
    std::copy_n(chunk.q.data() + (row * H + g * heads) * D, heads * D, q.data() + n * heads * D);
    const auto seen = seen_positions(full, b, pass.position + first + n);
    for (int64_t h = 0; h < heads; ++h) {
      tile.first[n * heads + h] = static_cast<int32_t>(seen.begin - span.low);
      tile.last[n * heads + h] = static_cast<int32_t>(seen.end - 1 - span.low);
    }
  }
  std::fill(q.begin() + tile.rows * D, q.end(), T{});
  Typed<T>::attend(
      kernel_, tile, q.data(), D);  // the queries are done with when the first z is there
  for (int64_t n = 0; n < count; ++n) {
    const auto row = b * pass.T + first + n;
    std::copy_n(q.data() + n * heads * D, heads * D, chunk.z.data() + (row * H + g * heads) * D);
  }
}

template void FusedEngine::place_token(const Pass&, int64_t, int64_t, Chunk<Bf16>&, int);
template void FusedEngine::place_token(const Pass&, int64_t, int64_t, Chunk<float>&, int);
template void FusedEngine::make_panels(int64_t, const KeySpan&, int64_t, Chunk<Bf16>&);
template void FusedEngine::make_panels(int64_t, const KeySpan&, int64_t, Chunk<float>&);
template void FusedEngine::attend_unit(
    const Pass&, int64_t, const KeySpan&, int64_t, Chunk<Bf16>&, int);
template void FusedEngine::attend_unit(
    const Pass&, int64_t, const KeySpan&, int64_t, Chunk<float>&, int);

}  // namespace gemma_torch
