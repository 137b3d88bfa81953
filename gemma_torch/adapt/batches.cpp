#include "gemma_torch/adapt/batches.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

// Each of 0 .. bound - 1 alike. The standard's distributions differ between libraries.
uint64_t draw_below(uint64_t bound, std::mt19937_64& generator) {
  const uint64_t refused = (0 - bound) % bound;  // 2^64 mod bound: what is left is a multiple of it
  uint64_t drawn = generator();
  while (drawn < refused) {
    drawn = generator();
  }
  return drawn % bound;
}

}  // namespace

Placement training_placement(const at::Tensor& ids, const at::Tensor& first) {
  Placement placement;
  placement.positions = at::arange(ids.size(1), ids.options());
  placement.global.positions = placement.local.positions = placement.positions;
  placement.first = first;
  return placement;
}

std::vector<int64_t> shuffled(int64_t n, uint64_t seed, int64_t epoch) {
  const auto low = [](uint64_t value) { return static_cast<uint32_t>(value); };
  const auto at = static_cast<uint64_t>(epoch);
  std::seed_seq halves{low(seed), low(seed >> 32U), low(at), low(at >> 32U)};
  std::mt19937_64 generator(halves);
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  for (auto left = order.size(); left > 1; --left) {
    std::swap(order[left - 1], order[draw_below(left, generator)]);
  }
  return order;
}

Batches::Batches(const TrainingData& data, const BatchOptions& options)
    : data_(&data), options_(options) {
  check(options.rows >= 1, "[batches] rows: expected at least 1, got {}", options.rows);
  check(options.ranks >= 1, "[batches] ranks: expected at least 1, got {}", options.ranks);
  check(options.rank >= 0 && options.rank < options.ranks,
        "[batches] rank: expected 0 to {}, got {}",
        options.ranks - 1,
        options.rank);
  check(options.max_tokens >= data.longest(),
        "[batches] max_tokens: expected at least the {} of the longest example, got {}",
        data.longest(),
        options.max_tokens);
  seek({});
}

Batches::Plan Batches::plan_of(int64_t epoch) const {
  Plan plan{.epoch = epoch};
  if (options_.shuffle) {
    plan.order = shuffled(data_->size(), options_.seed, epoch);
  } else {
    plan.order.resize(static_cast<size_t>(data_->size()));
    std::iota(plan.order.begin(), plan.order.end(), 0);
  }
  int64_t used = 0;
  for (size_t i = 0; i < plan.order.size(); ++i) {
    const auto length = data_->length(plan.order[i]);
    if (i == 0 || !options_.pack || used + length > options_.max_tokens) {
      plan.rows.push_back(static_cast<int64_t>(i));
      used = 0;
    }
    used += length;
  }
  plan.rows.push_back(data_->size());
  return plan;
}

int64_t Batches::batches_of(const Plan& plan) const {
  const auto rows = static_cast<int64_t>(plan.rows.size()) - 1;
  return (rows + options_.rows - 1) / options_.rows;
}

int64_t Batches::per_epoch(int64_t epoch) const {
  check(epoch >= 0, "[batches] epoch: expected at least 0, got {}", epoch);
  if (!options_.pack) {
    return (data_->size() + options_.rows - 1) / options_.rows;
  }
  return batches_of(epoch == plan_.epoch ? plan_ : plan_of(epoch));
}

BatchPosition Batches::moved(BatchPosition position, int64_t batches) const {
  position.batch += batches;
  for (auto count = per_epoch(position.epoch); position.batch >= count;
       count = per_epoch(position.epoch)) {
    position.batch -= count;
    ++position.epoch;
  }
  return position;
}

void Batches::seek(BatchPosition position) {
  const auto count = per_epoch(position.epoch);
  check(position.batch >= 0 && position.batch < count,
        "[batches] batch of epoch {}: expected 0 to {}, got {}",
        position.epoch,
        count - 1,
        position.batch);
  position_ = position;
  upcoming_ = moved(position, options_.rank);
}

TrainingBatch Batches::next() {
  if (plan_.epoch != upcoming_.epoch) {
    plan_ = plan_of(upcoming_.epoch);
  }
  auto batch = read(upcoming_.batch);  // first, so that an Error leaves the place as it was
  position_ = moved(position_, options_.ranks);
  upcoming_ = moved(position_, options_.rank);
  return batch;
}

TrainingBatch Batches::read(int64_t index) const {
  const auto begin = plan_.rows.begin() + index * options_.rows;
  const auto B = std::min<int64_t>(options_.rows, plan_.rows.end() - 1 - begin);
  TrainingBatch batch;
  int64_t T = 0;
  for (int64_t b = 0; b < B; ++b) {
    int64_t width = 0;
    for (auto i = begin[b]; i < begin[b + 1]; ++i) {
      batch.examples.push_back(plan_.order[static_cast<size_t>(i)]);
      width += data_->length(batch.examples.back());
    }
    T = std::max(T, width);
    batch.tokens += width;
  }
  batch.ids = at::zeros({B, T}, at::kLong);
  const auto first = at::arange(T, at::kLong).repeat({B, 1});
  std::vector<int64_t> scored, targets;
  auto next = batch.examples.begin();
  for (int64_t b = 0; b < B; ++b) {
    int64_t column = 0;
    for (const auto end = next + (begin[b + 1] - begin[b]); next != end; ++next) {
      const auto example = data_->example(*next);
      const auto length = static_cast<int64_t>(example.ids.size());
      batch.ids[b].slice(0, column, column + length).copy_(at::tensor(example.ids, at::kLong));
      first[b].slice(0, column, column + length).fill_(column);
      for (size_t t = 0; t < example.ids.size(); ++t) {
        if (example.is_target[t]) {
          scored.push_back(b * T + column + static_cast<int64_t>(t) - 1);
          targets.push_back(example.ids[t]);
        }
      }
      column += length;
    }
  }
  const bool packed = static_cast<int64_t>(batch.examples.size()) > B;
  batch.first = packed ? first : at::Tensor();
  batch.scored = at::tensor(scored, at::kLong);
  batch.targets = at::tensor(targets, at::kLong);
  return batch;
}

}  // namespace gemma_torch
