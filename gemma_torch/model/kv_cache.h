#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "gemma_torch/model/config.h"

namespace gemma_torch {

/// Where the tokens of one call stand, and which stored tokens they meet, for one layer type.
struct Stored {
  at::Tensor positions;  // (S) int64, what each slot holds, -1 where empty
  at::Tensor slots;      // (T) int64, where the new tokens go; undefined without a cache
};

/// Made once for a call and shared by its layers.
struct Placement {
  at::Tensor positions;  // (T) int64, columns of the sequence, the same for every row
  /// (B, 1) int64, left padding of each row, or (B, T), the oldest column that each token may see, where a row holds
  /// several sequences; undefined: none.
  at::Tensor first;
  Stored global, local;  // full and sliding layers
};

/// Keys and values of one layer, preallocated: (B, G, slots, D) each.
class LayerCache {
 public:
  LayerCache(at::Tensor keys, at::Tensor values);
  explicit LayerCache(at::Tensor pairs);

  /// Writes keys and values (B, G, T, D) of the new tokens to their slots, then gives those of all S slots that
  /// the call may meet, (B, G, S, D) in slot order and in the dtype given.
  std::pair<at::Tensor, at::Tensor> update(const at::Tensor& k,
                                           const at::Tensor& v,
                                           const Stored& stored);

  at::Tensor keys, values;
  /// (B, G, slots, 2, D), of which keys and values are views; undefined unless KvCacheOptions::paired.
  at::Tensor pairs;
};

struct KvCacheOptions {
  int64_t batch = 1;
  int64_t capacity = 4096;  // tokens a row may hold, padding included
  int64_t chunk = 512;      // most tokens of one call
  c10::Device device = c10::kCPU;
  c10::ScalarType dtype = c10::kBFloat16;
  /// A key and its value side by side, for a reader that meets both at once.
  bool paired = false;
  /// Its tensors stay the same ones for good, `first` among them, for a recorded graph that reads and writes them.
  bool fixed = false;
};

/// The keys and values of a sequence, on the device, allocated once.
///
/// Full layers have a slot per position. Sliding layers have a ring of window + chunk - 1 slots, so that writing a
/// whole chunk never overwrites a key which one of the chunk's own queries still sees: write first, then attend.
/// Both have one spare slot at the end for tokens that count for nothing (position -1).
/// A slot s holds position `positions[s]`. Row b sees slot s from position p when it is p itself, or when
/// first[b] <= positions[s] <= p and, in sliding layers, positions[s] > p - window.
class KvCache {
 public:
  KvCache(const Gemma3Config& cfg, const KvCacheOptions& options);

  /// Places the next `n` tokens (at most `chunk`). The cache's position moves only with advance(n).
  /// Throws: Error if they do not fit.
  Placement place(int64_t n);
  void advance(int64_t n);

  /// place(n) for a recorded graph: `positions` (T), one after another, are known to the device alone, and every slot is
  /// met whatever it holds. Checks nothing. Needs KvCacheOptions::fixed.
  Placement place(const at::Tensor& positions);

  /// All it holds, by name: keys_0, values_0, keys_1, .., global_positions, local_positions, first.
  std::vector<std::pair<std::string, at::Tensor>> state() const;

  /// place(n) for a caller on the CPU that finds slots by itself and wants nothing allocated: position p is in slot p
  /// of full layers and in slot p % ring() of sliding ones.
  void occupy(int64_t n);
  int64_t ring() const { return ring_; }

  /// Forgets every token at or past `position`. Throws: Error if a sliding layer's ring has already lost a token
  /// that the next one would see, or if `position` is past the end.
  void rewind(int64_t position);

  /// Empties the cache. `first` (B) int64 gives the left padding of each row of what comes; undefined: none.
  void reset(const at::Tensor& first = {});

  /// Takes over the tokens of another cache of the same shape (capacity may be larger here).
  void copy_from(const KvCache& other);

  LayerCache& layer(int64_t index) { return layers_[static_cast<size_t>(index)]; }
  int64_t position() const { return position_; }
  const KvCacheOptions& options() const { return options_; }
  int64_t bytes() const;

  /// Bytes of keys and values that a step of one token reads after `depth` tokens, all rows together.
  int64_t bytes_seen(int64_t depth) const;

 private:
  void check_fits(int64_t n) const;

  Gemma3Config cfg_;
  KvCacheOptions options_;
  int64_t ring_ = 0;        // slots of a sliding layer, the spare one not counted
  int64_t position_ = 0;    // the next token's
  int64_t high_water_ = 0;  // one past the last position ever written since reset
  at::Tensor first_;        // (B, 1); undefined where all are 0 and the cache is not fixed
  at::Tensor global_positions_, local_positions_;  // (slots + 1) int64
  std::vector<LayerCache> layers_;
};

}  // namespace gemma_torch
