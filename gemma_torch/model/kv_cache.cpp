#include "gemma_torch/model/kv_cache.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/remainder.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "gemma_torch/base/error.h"
#include "gemma_torch/base/memory.h"
#include "gemma_torch/base/tensor_map.h"

namespace gemma_torch {
namespace {

// Lengths seen by attention come in steps, so that few shapes occur.
constexpr int64_t kStep = 256;

int64_t rounded_up(int64_t length, int64_t most) {
  return std::min(most, (length + kStep - 1) / kStep * kStep);
}

}  // namespace

LayerCache::LayerCache(at::Tensor given_keys, at::Tensor given_values)
    : keys(std::move(given_keys)), values(std::move(given_values)) {}

LayerCache::LayerCache(at::Tensor given_pairs)
    : LayerCache(given_pairs.select(/*dim=*/3, 0), given_pairs.select(/*dim=*/3, 1)) {
  pairs = std::move(given_pairs);
}

std::pair<at::Tensor, at::Tensor> LayerCache::update(const at::Tensor& k,
                                                     const at::Tensor& v,
                                                     const Stored& stored) {
  keys.index_copy_(/*dim=*/2, stored.slots, k.to(keys.scalar_type()));  // the cache's own dtype
  values.index_copy_(/*dim=*/2, stored.slots, v.to(values.scalar_type()));
  const auto length = stored.positions.size(0);
  return {keys.narrow(/*dim=*/2, /*start=*/0, length).to(k.scalar_type()),
          values.narrow(/*dim=*/2, /*start=*/0, length).to(v.scalar_type())};
}

KvCache::KvCache(const Gemma3Config& cfg, const KvCacheOptions& options)
    : cfg_(validated(cfg)), options_(options), ring_(cfg.sliding_window + options.chunk - 1) {
  check(options.batch >= 1 && options.capacity >= 1 && options.chunk >= 1,
        "[kv_cache] batch, capacity and chunk: expected at least 1, got {}, {} and {}",
        options.batch,
        options.capacity,
        options.chunk);
  // A sequence that never fills the ring does not need all of it.
  ring_ = std::min(ring_, options.capacity);
  const auto kv = at::TensorOptions(options.dtype).device(options.device);
  const auto index = at::TensorOptions(at::kLong).device(options.device);
  global_positions_ = at::full({options.capacity + 1}, -1, index);
  local_positions_ = at::full({ring_ + 1}, -1, index);
  if (options.fixed) {
    first_ = at::zeros({options.batch, 1}, index);
  }
  const auto slots_of = [&](LayerType type) {
    return (type == LayerType::kFullAttention ? options.capacity : ring_) + 1;
  };
  const auto B = options.batch, G = cfg_.n_kv_groups, D = cfg_.head_dim;
  int64_t total = 0;
  for (const auto type : cfg_.layer_types) {
    total += 2 * B * G * slots_of(type) * D;
  }
  // One piece for all layers: on large pages it has few of them, and no remainder in each layer.
  const auto all = options.device.is_cpu() ? zeros_on_large_pages({total}, options.dtype)
                                           : at::zeros({total}, kv);
  int64_t used = 0;
  const auto next = [&](at::IntArrayRef shape) {
    const auto n = c10::multiply_integers(shape);
    used += n;
    return all.narrow(/*dim=*/0, used - n, n).view(shape);
  };
  for (const auto type : cfg_.layer_types) {
    const auto slots = slots_of(type);
    if (options.paired) {
      layers_.emplace_back(next({B, G, slots, 2, D}));
    } else {
      const auto keys = next({B, G, slots, D});
      layers_.emplace_back(keys, next({B, G, slots, D}));
    }
  }
}

void KvCache::check_fits(int64_t n) const {
  check(n >= 1 && n <= options_.chunk,
        "[kv_cache] tokens of one call: expected 1 to {}, got {}",
        options_.chunk,
        n);
  check(position_ + n <= options_.capacity,
        "[kv_cache] expected at most {} tokens, got {} (position {})",
        options_.capacity,
        position_ + n,
        position_);
}

void KvCache::occupy(int64_t n) {
  check_fits(n);
  auto* global = global_positions_.mutable_data_ptr<int64_t>();
  auto* local = local_positions_.mutable_data_ptr<int64_t>();
  for (int64_t p = position_; p < position_ + n; ++p) {
    global[p] = p;
    local[p % ring_] = p;
  }
}

Placement KvCache::place(int64_t n) {
  check_fits(n);
  Placement placement;
  placement.positions = at::arange(position_, position_ + n, global_positions_.options());
  placement.first = first_;
  placement.global.slots = placement.positions;
  placement.local.slots =
      position_ + n <= ring_ ? placement.positions : at::remainder(placement.positions, ring_);
  global_positions_.index_copy_(/*dim=*/0, placement.global.slots, placement.positions);
  local_positions_.index_copy_(/*dim=*/0, placement.local.slots, placement.positions);
  const auto used = std::max(high_water_, position_ + n);
  placement.global.positions =
      global_positions_.narrow(/*dim=*/0, /*start=*/0, rounded_up(used, options_.capacity + 1));
  placement.local.positions =
      local_positions_.narrow(/*dim=*/0, /*start=*/0, rounded_up(used, ring_ + 1));
  return placement;
}

Placement KvCache::place(const at::Tensor& positions) {
  check(options_.fixed, "[kv_cache] expected a fixed cache, got one whose tensors change");
  Placement placement;
  placement.positions = positions;
  placement.first = first_;
  placement.global = {global_positions_, positions};
  placement.local = {local_positions_, at::remainder(positions, ring_)};
  global_positions_.index_copy_(/*dim=*/0, placement.global.slots, positions);
  local_positions_.index_copy_(/*dim=*/0, placement.local.slots, positions);
  return placement;
}

std::vector<std::pair<std::string, at::Tensor>> KvCache::state() const {
  std::vector<std::pair<std::string, at::Tensor>> all;
  for (size_t i = 0; i < layers_.size(); ++i) {
    all.emplace_back("keys_" + std::to_string(i), layers_[i].keys);
    all.emplace_back("values_" + std::to_string(i), layers_[i].values);
  }
  all.emplace_back("global_positions", global_positions_);
  all.emplace_back("local_positions", local_positions_);
  all.emplace_back("first", first_);
  return all;
}

void KvCache::advance(int64_t n) {
  position_ += n;
  high_water_ = std::max(high_water_, position_);
}

void KvCache::rewind(int64_t position) {
  check(position >= 0 && position <= position_,
        "[rewind] position: expected 0 to {}, got {}",
        position_,
        position);
  const auto slack = ring_ - cfg_.sliding_window;
  check(high_water_ <= ring_ || position == 0 || high_water_ - position <= slack,
        "[rewind] position: expected 0 or at least {}, got {} (the ring of the sliding layers "
        "holds no more). "
        "Hint: reset and prefill again",
        high_water_ - slack,
        position);
  if (position == 0) {
    const auto first = first_.defined() ? first_.squeeze(/*dim=*/1).clone() : first_;
    return reset(first);
  }
  global_positions_.masked_fill_(global_positions_.ge(position), -1);
  local_positions_.masked_fill_(local_positions_.ge(position), -1);
  position_ = position;
}

void KvCache::reset(const at::Tensor& first) {
  check(!first.defined() || (first.dim() == 1 && first.size(0) == options_.batch),
        "[reset] first: expected ({}), got {}",
        options_.batch,
        first.defined() ? shape_str(first.sizes()) : "");
  global_positions_.fill_(-1);
  local_positions_.fill_(-1);
  if (options_.fixed) {
    first.defined() ? first_.copy_(first.unsqueeze(/*dim=*/1)) : first_.zero_();
  } else {
    first_ = first.defined() ? first.to(global_positions_.options()).unsqueeze(/*dim=*/1) : first;
  }
  position_ = 0;
  high_water_ = 0;
}

void KvCache::copy_from(const KvCache& other) {
  check(other.options_.batch == options_.batch && other.layers_.size() == layers_.size() &&
            other.high_water_ <= options_.capacity && other.ring_ <= ring_,
        "[copy_from] expected a cache of batch {}, capacity {} and ring {}, got {}, {} and {}",
        options_.batch,
        options_.capacity,
        ring_,
        other.options_.batch,
        other.options_.capacity,
        other.ring_);
  check(other.ring_ == ring_ || other.high_water_ <= other.ring_,
        "[copy_from] ring: expected {} slots, got {}, which are wrapped",
        ring_,
        other.ring_);
  reset(other.first_.defined() ? other.first_.squeeze(/*dim=*/1) : at::Tensor());
  const auto copy = [](const at::Tensor& to, const at::Tensor& from, int64_t dim, int64_t length) {
    to.narrow(dim, 0, length).copy_(from.narrow(dim, 0, length));
  };
  const auto global = std::min(other.high_water_, options_.capacity);
  const auto local = std::min(other.high_water_, ring_);
  copy(global_positions_, other.global_positions_, /*dim=*/0, global);
  copy(local_positions_, other.local_positions_, /*dim=*/0, local);
  for (size_t i = 0; i < layers_.size(); ++i) {
    const bool full = cfg_.layer_types[i] == LayerType::kFullAttention;
    copy(layers_[i].keys, other.layers_[i].keys, /*dim=*/2, full ? global : local);
    copy(layers_[i].values, other.layers_[i].values, /*dim=*/2, full ? global : local);
  }
  position_ = other.position_;
  high_water_ = other.high_water_;
}

int64_t KvCache::bytes() const {
  int64_t total = 0;
  for (const auto& layer : layers_) {
    total += static_cast<int64_t>(layer.keys.nbytes() + layer.values.nbytes());
  }
  return total;
}

int64_t KvCache::bytes_seen(int64_t depth) const {
  const auto token = 2 * options_.batch * cfg_.n_kv_groups * cfg_.head_dim *
                     static_cast<int64_t>(c10::elementSize(options_.dtype));
  int64_t bytes = 0;
  for (const auto type : cfg_.layer_types) {
    bytes +=
        token * (type == LayerType::kFullAttention ? depth : std::min(depth, cfg_.sliding_window));
  }
  return bytes;
}

}  // namespace gemma_torch
