// Many tokens: bound by arithmetic. Weights are unpacked into panels, 32 rows at a time, which all tokens pass while
// they are in the inner caches; norms, RoPE, gelu and softmax happen where their input lies in cache.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "gemma_torch/base/memory.h"
#include "gemma_torch/engine/fused_chunk.h"

namespace gemma_torch {
namespace {

using kernels::Bf16;
using kernels::FusedKernels;
using kernels::KeyValuePanels;
using kernels::Packed;
using kernels::QueryTile;

constexpr int64_t kTile = 32;

int64_t up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// The kernels for activations of one type.
template <typename T>
struct Typed;
template <>
struct Typed<Bf16> {
  static void panel(const FusedKernels& k, const Packed& w, int64_t block, Bf16* out) {
    k.panel_bf16(w, block, out);
  }
  static void gemm(const FusedKernels& k,
                   const Bf16* a,
                   int64_t stride,
                   const Bf16* const p[2],
                   int64_t n,
                   float* c,
                   int64_t c_stride) {
    k.gemm.bf16(a, stride, p, n, c, c_stride, false);
  }
  static void gelu(const FusedKernels& k, const float* c, Bf16* y, int64_t stride) {
    k.gelu_tile_bf16(c, y, stride);
  }
  static void put(const FusedKernels& k, const float* x, Bf16* y, int64_t n) { k.to_bf16(x, y, n); }
  static void attend(const FusedKernels& k,
                     const QueryTile<Bf16>& tile,
                     Bf16* out,
                     int64_t stride) {
    k.attend_tile_bf16(tile, k.gemm, out, stride);
  }
  static const KeyValuePanels<Bf16, Bf16>& panels(const FusedKernels& k, Bf16) {
    return k.panels_bf16_bf16;
  }
  static const KeyValuePanels<Bf16, float>& panels(const FusedKernels& k, float) {
    return k.panels_bf16_f32;
  }
};
template <>
struct Typed<float> {
  static void panel(const FusedKernels& k, const Packed& w, int64_t block, float* out) {
    k.panel_f32(w, block, out);
  }
  static void gemm(const FusedKernels& k,
                   const float* a,
                   int64_t stride,
                   const float* const p[2],
                   int64_t n,
                   float* c,
                   int64_t c_stride) {
    k.gemm.f32(a, stride, p, n, c, c_stride, false);
  }
  static void gelu(const FusedKernels& k, const float* c, float* y, int64_t stride) {
    k.gelu_tile_f32(c, y, stride);
  }
  static void put(const FusedKernels&, const float* x, float* y, int64_t n) {
    std::copy_n(x, n, y);
  }
  static void attend(const FusedKernels& k,
                     const QueryTile<float>& tile,
                     float* out,
                     int64_t stride) {
    k.attend_tile_f32(tile, k.gemm, out, stride);
  }
  static const KeyValuePanels<float, Bf16>& panels(const FusedKernels& k, Bf16) {
    return k.panels_f32_bf16;
  }
  static const KeyValuePanels<float, float>& panels(const FusedKernels& k, float) {
    return k.panels_f32_f32;
  }
};

// a (padded, w.columns) w^T: pairs of blocks, 32 rows of w, as threads claim them.
template <typename T>
struct Product {
  const FusedKernels& kernel;
  const Packed& w;
  const T* a;
  int64_t padded;
  T* panels;  // this thread's
};

// Asks for the weights of the next pair while this one's products run, so that its panels are made from the second
// cache: memory and arithmetic would take turns otherwise.
class Ahead {
 public:
  Ahead(const Packed& w, int64_t pair, int64_t steps)
      : next_(w.cells + 2 * pair * w.stride()),
        pitch_(w.blocks() * w.stride()),
        lines_((2 * w.stride() + 63) / 64),
        left_(pair < w.blocks() / 2 ? w.slices() * lines_ : 0),
        step_((left_ + steps - 1) / steps) {}

  void step() {
    for (int64_t n = std::min(step_, left_); n > 0; --n, --left_) {
      __builtin_prefetch(next_ + line_ * 64, 0, 2);
      if (++line_ == lines_) {
        line_ = 0;
        next_ += pitch_;
      }
    }
  }

 private:
  const uint8_t* next_;
  int64_t pitch_, lines_, left_, step_, line_ = 0;
};

// The columns of pair p of the result begin at place(p), c_stride from row to row; done(p, c) follows when they are there.
template <typename T, typename Place, typename Done>
void run(kernels::Team& team,
         const Product<T>& p,
         int64_t c_stride,
         const Place& place,
         const Done& done) {
  const auto k = p.w.columns;
  const T* const panels[2] = {p.panels, p.panels + k * 16};
  for (auto pair = team.claim(); pair < p.w.blocks() / 2;) {
    const auto next = team.claim();
    Ahead ahead(p.w, next, p.padded / kTile);
    Typed<T>::panel(p.kernel, p.w, 2 * pair, p.panels);
    Typed<T>::panel(p.kernel, p.w, 2 * pair + 1, p.panels + k * 16);
    float* const c = place(pair);
    for (int64_t row = 0; row < p.padded; row += kTile) {
      ahead.step();
      Typed<T>::gemm(p.kernel, p.a + row * k, k, panels, k, c + row * c_stride, c_stride);
    }
    done(pair, c);
    pair = next;
  }
}

template <typename T>
void multiply(kernels::Team& team, const Product<T>& p, float* c) {
  run(
      team,
      p,
      p.w.rows,
      [&](int64_t pair) { return c + pair * kTile; },
      [](int64_t, const float*) {});
}

}  // namespace

template <typename T>
void FusedEngine::Chunk<T>::fit(int64_t rows, int64_t keys, const Gemma3Config& cfg, int threads) {
  padded = up(rows, kTile);
  if (rows <= rows_ && keys <= keys_) {
    return;
  }
  rows_ = std::max(rows_, padded);
  keys_ = std::max(keys_, keys);
  scratch.resize(static_cast<size_t>(threads));
  const auto E = cfg.emb_dim, D = cfg.head_dim, H = cfg.n_heads, G = cfg.n_kv_groups,
             F = cfg.hidden_dim;
  size_t used = 0;
  const auto take = [&](auto& span, int64_t count) {
    using Element = typename std::decay_t<decltype(span)>::element_type;
    const auto n = static_cast<size_t>(count);
    if (arena_ != nullptr) {
      span = {reinterpret_cast<Element*>(arena_.get() + used), n};
    }
    used += (n * sizeof(Element) + 127) / 128 * 128;
  };
  const auto take_all = [&] {
    used = 0;
    take(x, rows_ * E);
    take(h, rows_ * E);
    take(qkv, rows_ * (H + 2 * G) * D);
    take(q, rows_ * H * D);
    take(z, rows_ * H * D);
    take(y, rows_ * E);
    take(act, rows_ * F);
    take(key_panels, keys_ * D);
    take(value_panels, keys_ * D);
    for (auto& s : scratch) {
      take(s.panels, 32 * std::max({E, H * D, F}));
      take(s.q, kTile * D);
      take(s.c, std::max(rows_ * kTile, D * (H + G)));
      take(s.wide, E);
    }
  };
  arena_ = nullptr;
  take_all();  // counts
  arena_ = large_pages(used);
  take_all();
}

FusedEngine::KeySpan FusedEngine::key_span(const Pass& pass, bool full) const {
  int64_t low = pass.position;
  for (int64_t b = 0; b < batch(); ++b) {
    low = std::min(low, seen_positions(full, b, pass.position).begin);
  }
  const auto count = pass.position + pass.T - low;
  return {low, count, up(count, kTile)};
}

void FusedEngine::run_chunk(const Pass& pass, float* hidden) {
  clock_.start();
  fill_angles(pass);
  const auto rows = pass.rows(batch());
  const auto go = [&](auto& chunk) {
    using C = std::decay_t<decltype(*chunk)>;
    if (chunk == nullptr) {
      chunk = std::make_unique<C>();
    }
    const auto keys =
        batch() * model_->cfg.n_kv_groups * (up(pass.position + pass.T, kTile) + kTile);
    chunk->fit(rows, keys, model_->cfg, team_.size());
    team_.run([&](int i) {
      kernel_.gemm.begin();
      chunk_worker(pass, hidden, *chunk, i);
      kernel_.gemm.end();
    });
  };
  bf16_products_ ? go(chunks_->bf16) : go(chunks_->f32);
}

// Normalises, rotates and stores one token's queries, keys and values.
template <typename T>
void FusedEngine::place_token(const Pass& pass, int64_t l, int64_t row, Chunk<T>& chunk, int i) {
  const auto& cfg = model_->cfg;
  const auto& layer = pack_->layers()[static_cast<size_t>(l)];
  const bool full = cfg.layer_types[static_cast<size_t>(l)] == LayerType::kFullAttention;
  const auto D = cfg.head_dim, H = cfg.n_heads, G = cfg.n_kv_groups, t = row % pass.T;
  const float* const cos = buffers_->cos[full].data() + t * D / 2;
  const float* const sin = buffers_->sin[full].data() + t * D / 2;
  const auto scaling = 1.0F / std::sqrt(static_cast<float>(cfg.query_pre_attn_scalar));
  const float* const qkv = chunk.qkv.data() + row * layer.qkv.rows;
  float* const heads = chunk.scratch[static_cast<size_t>(i)].c.data();
  for (int64_t h = 0; h < H + G; ++h) {
    const float* const norm = h < H ? layer.q_norm : layer.k_norm;
    norm != nullptr ? kernel_.rms_norm(
                          qkv + h * D, norm, heads + h * D, D, static_cast<float>(cfg.rms_norm_eps))
                    : static_cast<void>(std::copy_n(qkv + h * D, D, heads + h * D));
    kernel_.rope(heads + h * D, cos, sin, D);
  }
  for (int64_t j = 0; j < H * D; ++j) {
    heads[j] *= scaling;
  }
  Typed<T>::put(kernel_, heads, chunk.q.data() + row * H * D, H * D);
  store_key_value(l, row / pass.T, pass.position + t, heads + H * D, qkv + (H + G) * D);
}

// 32 keys and values of one row and group as panels; keys are counted from `low` on.
template <typename T>
void FusedEngine::make_panels(int64_t l, const KeySpan& span, int64_t unit, Chunk<T>& chunk) {
  const auto& cfg = model_->cfg;
  const bool full = cfg.layer_types[static_cast<size_t>(l)] == LayerType::kFullAttention;
  const auto D = cfg.head_dim;
  const auto tiles = span.padded / kTile;
  const auto owner = unit / tiles, first = unit % tiles * kTile;  // of (B, G); within the span
  auto& cache = cache_.layer(l);
  const auto slots = cache.keys.size(2);
  T* const key_panels = chunk.key_panels.data() + owner * span.padded * D;
  T* const value_panels = chunk.value_panels.data() + owner * span.padded * D;
  const auto copy = [&](auto zero) {
    using S = decltype(zero);
    const auto* keys = static_cast<const S*>(cache.keys.const_data_ptr()) + owner * slots * D;
    const auto* values = static_cast<const S*>(cache.values.const_data_ptr()) + owner * slots * D;
    const auto& panels = Typed<T>::panels(kernel_, zero);
    const auto count = std::clamp<int64_t>(span.count - first, 0, kTile);
    const auto slot = full ? span.low + first : (span.low + first) % cache_.ring();
    std::vector<S> unwrapped;                     // rarely needed: twice a layer at most
    if (!full && slot + count > cache_.ring()) {  // the ring's end is within: lay it straight
      unwrapped.resize(static_cast<size_t>(2 * kTile * D));
      for (int64_t n = 0; n < count; ++n) {
        const auto from = (slot + n) % cache_.ring() * D;
        std::copy_n(keys + from, D, unwrapped.data() + n * D);
        std::copy_n(values + from, D, unwrapped.data() + (kTile + n) * D);
      }
      keys = unwrapped.data();
      values = unwrapped.data() + kTile * D;
    } else {
      keys += slot * D;
      values += slot * D;
    }
    panels.key(keys, std::min<int64_t>(count, 16), D, key_panels + first * D);
    panels.key(keys + 16 * D, std::max<int64_t>(count - 16, 0), D, key_panels + (first + 16) * D);
    panels.values(values, count, D, span.padded, value_panels + first * 16);
  };
  cache_.options().dtype == c10::kFloat ? copy(0.0F) : copy(Bf16{});
}

// Attention of one tile of queries: some tokens of one row of the batch, all heads of one group.
template <typename T>
void FusedEngine::attend_unit(
    const Pass& pass, int64_t l, const KeySpan& span, int64_t unit, Chunk<T>& chunk, int i) {
  const auto& cfg = model_->cfg;
  const bool full = cfg.layer_types[static_cast<size_t>(l)] == LayerType::kFullAttention;
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

template <typename T>
void FusedEngine::chunk_worker(const Pass& pass, float* hidden, Chunk<T>& chunk, int i) {
  const auto& cfg = model_->cfg;
  const auto rows = pass.rows(batch());
  const auto E = cfg.emb_dim, F = cfg.hidden_dim, G = cfg.n_kv_groups;
  const auto eps = static_cast<float>(cfg.rms_norm_eps);
  auto& scratch = chunk.scratch[static_cast<size_t>(i)];
  const auto mine = team_.share(rows, i);
  const auto lap = [&](const char* kernel) {
    if (i == 0) {
      clock_.lap(kernel);
    }
  };
  const auto norm_to_h = [&](int64_t row, const float* scale) {
    float* const wide = scratch.wide.data();
    kernel_.rms_norm(chunk.x.data() + row * E, scale, wide, E, eps);
    Typed<T>::put(kernel_, wide, chunk.h.data() + row * E, E);
  };
  // x += norm(y)
  const auto add_normed = [&](int64_t row, const float* scale) {
    float* const wide = scratch.wide.data();
    kernel_.rms_norm(chunk.y.data() + row * E, scale, wide, E, eps);
    float* const x = chunk.x.data() + row * E;
    for (int64_t j = 0; j < E; ++j) {
      x[j] += wide[j];
    }
  };
  const auto product = [&](const Packed& w, std::span<const T> a) {
    return Product<T>{kernel_, w, a.data(), chunk.padded, scratch.panels.data()};
  };
  for (auto row = mine.begin; row < mine.end; ++row) {
    embed(pass, row, chunk.x.data() + row * E);
    norm_to_h(row, pack_->layers()[0].input_norm);
  }
  for (int64_t l = 0; l < cfg.n_layers; ++l) {
    const auto& layer = pack_->layers()[static_cast<size_t>(l)];
    const bool full = cfg.layer_types[static_cast<size_t>(l)] == LayerType::kFullAttention;
    const auto span = key_span(pass, full);
    team_.barrier();
    lap("norms");
    multiply(team_, product(layer.qkv, chunk.h), chunk.qkv.data());
    team_.barrier();
    lap("qkv");
    for (auto row = mine.begin; row < mine.end; ++row) {
      place_token(pass, l, row, chunk, i);
    }
    team_.barrier();
    lap("q and k norms, RoPE, cache");
    const auto panels = batch() * G * (span.padded / kTile);
    for (auto unit = team_.claim(); unit < panels; unit = team_.claim()) {
      make_panels(l, span, unit, chunk);
    }
    team_.barrier();
    lap("panels of keys and values");
    const auto tokens = kTile / (cfg.n_heads / G);
    const auto tiles = batch() * G * ((pass.T + tokens - 1) / tokens);
    for (auto unit = team_.claim(); unit < tiles; unit = team_.claim()) {
      attend_unit(pass, l, span, tiles - 1 - unit, chunk, i);  // the longest first
    }
    team_.barrier();
    lap("attention");
    multiply(team_, product(layer.out, chunk.z), chunk.y.data());
    team_.barrier();
    lap("out_proj");
    for (auto row = mine.begin; row < mine.end; ++row) {
      add_normed(row, layer.post_attn_norm);
      norm_to_h(row, layer.pre_ff_norm);
    }
    team_.barrier();
    lap("norms");
    const auto gate_up = product(layer.gate_up, chunk.h);
    run(
        team_,
        gate_up,
        kTile,
        [&](int64_t) { return scratch.c.data(); },
        [&](int64_t pair, const float* c) {
          // 16 gates and their 16 ups: what fc3 takes is made while they are in cache.
          for (int64_t row = 0; row < chunk.padded; row += kTile) {
            Typed<T>::gelu(kernel_, c + row * kTile, chunk.act.data() + row * F + pair * 16, F);
          }
        });
    team_.barrier();
    lap("gate, up, gelu");
    multiply(team_, product(layer.down, chunk.act), chunk.y.data());
    team_.barrier();
    lap("down");
    for (auto row = mine.begin; row < mine.end; ++row) {
      add_normed(row, layer.post_ff_norm);
      if (l + 1 < cfg.n_layers) {
        norm_to_h(row, pack_->layers()[static_cast<size_t>(l + 1)].input_norm);
      } else {
        std::copy_n(chunk.x.data() + row * E, E, hidden + row * E);
      }
    }
  }
}

}  // namespace gemma_torch
