// Many tokens: bound by arithmetic. Weights are unpacked into panels, 32 rows at a time, which all tokens pass while
// they are in the inner caches; norms, RoPE, gelu and softmax happen where their input lies in cache.

#include <algorithm>
#include <cmath>
#include <utility>

#include "gemma_torch/base/memory.h"
#include "gemma_torch/engine/fused_chunk.h"
#include "gemma_torch/kernels/cpu/prefetch.h"

namespace gemma_torch {
namespace {

using kernels::FusedKernels;

// a (padded, columns) w^T, for one w or several below each other: pairs of blocks, 32 rows of w, as threads claim them,
// whosever parts those lie in.
template <typename T>
struct Product {
  const FusedKernels& kernel;
  std::span<const PackedParts> w;
  const T* a;
  int64_t padded;
  T* panels;  // this thread's

  int64_t rows() const {
    int64_t sum = 0;
    for (const auto& matrix : w) {
      sum += matrix.rows;
    }
    return sum;
  }
};

// A pair of blocks of one matrix; none past the last.
struct BlockPair {
  const PackedParts* w = nullptr;
  int64_t index = 0;

  // The parts it lies in, [first, last), of which no other pair has a block; and where in them.
  std::pair<size_t, size_t> parts() const {
    if (w->cut == PackedParts::Cut::kColumns) {
      return {0, w->parts.size()};
    }
    const auto i = w->part_of(2 * index * kernels::kBlockRows);
    return {i, i + 1};
  }
  int64_t first_block(size_t part) const {
    return 2 * index -
           (w->cut == PackedParts::Cut::kRows ? w->begin[part] / kernels::kBlockRows : 0);
  }
};
BlockPair find_pair(std::span<const PackedParts> matrices, int64_t pair) {
  for (const auto& w : matrices) {
    if (pair < w.blocks() / 2) {
      return {&w, pair};
    }
    pair -= w.blocks() / 2;
  }
  return {};
}

// Both blocks of a pair as panels of all columns.
template <typename T>
void make_panels(const FusedKernels& kernel, const BlockPair& pair, T* const panels[2]) {
  const auto [first, last] = pair.parts();
  for (auto i = first; i < last; ++i) {
    const auto column = pair.w->cut == PackedParts::Cut::kColumns ? pair.w->begin[i] : 0;
    for (int64_t n = 0; n < 2; ++n) {
      Typed<T>::panel(kernel,
                      pair.w->parts[i],
                      pair.first_block(i) + n,
                      panels[n] + column * kernels::kBlockRows);
    }
  }
}

// Asks for the weights of the next pair while this one's products run, so that its panels are made from the second
// cache: memory and arithmetic would take turns otherwise.
class Ahead {
 public:
  Ahead(const BlockPair& pair, int64_t steps) : pair_(pair) {
    if (pair.w != nullptr) {
      part_ = pair.parts().first;
      const auto& w = pair.w->parts[part_];
      lines_ = (2 * w.stride() + 63) / 64;
      left_ = lines_ * (pair.w->cut == PackedParts::Cut::kRows ? 1 : pair.w->columns / w.slice);
      step_ = (left_ + steps - 1) / steps;
    }
  }

  void step() {
    for (int64_t n = std::min(step_, left_); n > 0; --n, --left_) {
      while (slice_ == pair_.w->parts[part_].slices()) {
        ++part_;
        slice_ = 0;
      }
      const auto& w = pair_.w->parts[part_];
      kernels::prefetch_later(
          w.cells + (slice_ * w.blocks() + pair_.first_block(part_)) * w.stride() + line_ * 64);
      if (++line_ == lines_) {
        line_ = 0;
        ++slice_;
      }
    }
  }

 private:
  BlockPair pair_;
  size_t part_ = 0;
  int64_t slice_ = 0, line_ = 0, lines_ = 0, left_ = 0, step_ = 0;
};

// The columns of pair p of the result begin at place(p), c_stride from row to row; done(p, c) follows when they are there.
template <typename T, typename Place, typename Done>
void run(kernels::Team& team,
         const Product<T>& p,
         int64_t c_stride,
         const Place& place,
         const Done& done) {
  const auto k = p.w[0].columns;
  T* const panels[2] = {p.panels, p.panels + k * 16};
  const auto pairs = p.rows() / kTile;
  for (auto pair = team.claim(); pair < pairs;) {
    const auto next = team.claim();
    Ahead ahead(find_pair(p.w, next), p.padded / kTile);
    make_panels(p.kernel, find_pair(p.w, pair), panels);
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
      p.rows(),
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
  PageArrays arrays;
  arrays.add(x, rows_ * E);
  arrays.add(h, rows_ * E);
  arrays.add(qkv, rows_ * (H + 2 * G) * D);
  arrays.add(q, rows_ * H * D);
  arrays.add(z, rows_ * H * D);
  arrays.add(y, rows_ * E);
  arrays.add(act, rows_ * F);
  arrays.add(key_panels, keys_ * D);
  arrays.add(value_panels, keys_ * D);
  for (auto& s : scratch) {
    arrays.add(s.panels, 32 * std::max({E, H * D, F}));
    arrays.add(s.q, kTile * D);
    arrays.add(s.c, std::max(rows_ * kTile, D * (H + G)));
    arrays.add(s.wide, E);
  }
  memory_ = nullptr;  // first: there need not be room for both
  memory_ = arrays.allocate();
}

void FusedEngine::run_chunk(const Pass& pass, float* hidden) {
  clock_.start();
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
      fill_angles(pass, i);
      chunk_worker(pass, hidden, *chunk, i);
      kernel_.gemm.end();
    });
  };
  bf16_products_ ? go(chunks_->bf16) : go(chunks_->f32);
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
  const auto product = [&](std::span<const PackedParts> w, std::span<const T> a) {
    return Product<T>{kernel_, w, a.data(), chunk.padded, scratch.panels.data()};
  };
  for (auto row = mine.begin; row < mine.end; ++row) {
    embed(pass, row, chunk.x.data() + row * E);
    norm_to_h(row, pack_->layers()[0].input_norm);
  }
  for (int64_t l = 0; l < cfg.n_layers; ++l) {
    const auto& layer = pack_->layers()[static_cast<size_t>(l)];
    const bool full = is_full(l);
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
    multiply(team_, product({&layer.out, 1}, chunk.z), chunk.y.data());
    team_.barrier();
    lap("out_proj");
    for (auto row = mine.begin; row < mine.end; ++row) {
      add_normed(row, layer.post_attn_norm);
      norm_to_h(row, layer.pre_ff_norm);
    }
    team_.barrier();
    lap("norms");
    const auto gate_up = product({&layer.gate_up, 1}, chunk.h);
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
    multiply(team_, product({&layer.down, 1}, chunk.act), chunk.y.data());
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
