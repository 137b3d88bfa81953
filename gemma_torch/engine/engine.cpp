#include "gemma_torch/engine/engine.h"

#include <ATen/Functions.h>

#include <algorithm>

#include "gemma_torch/base/error.h"
#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/engine/device_sampler.h"
#include "gemma_torch/engine/eager.h"
#include "gemma_torch/engine/fused.h"
#include "gemma_torch/engine/graph.h"
#include "gemma_torch/engine/recompute.h"
#include "gemma_torch/engine/traced.h"

namespace gemma_torch {

Engine::Engine(int64_t batch, int64_t capacity, int64_t vocab_size)
    : batch_(batch),
      capacity_(capacity),
      vocab_size_(vocab_size),
      history_(static_cast<size_t>(batch)),
      padding_(static_cast<size_t>(batch), 0) {
  for (auto& row : history_) {
    row.reserve(static_cast<size_t>(capacity));
  }
}

void Engine::append(const at::Tensor& given) {
  check(given.dim() == 2 && given.size(0) == batch_ && given.size(1) >= 1,
        "[append] ids: expected ({}, T) with T of at least 1, got {}",
        batch_,
        shape_str(given.sizes()));
  check(given.scalar_type() == at::kLong,
        "[append] ids: expected int64, got {}",
        c10::toString(given.scalar_type()));
  const auto ids = given.to(at::kCPU).contiguous();
  append_rows(ids.const_data_ptr<int64_t>(), ids.size(1));
}

void Engine::append(const std::vector<int64_t>& ids) {
  check(batch_ == 1, "[append] ids: expected {} rows, got 1", batch_);
  check(!ids.empty(), "[append] ids: expected at least one, got none");
  append_rows(ids.data(), static_cast<int64_t>(ids.size()));
}

void Engine::check_room(int64_t T) const {
  check(
      position() + T <= capacity_,
      "[append] expected at most {} tokens, got {} at position {}. Hint: a larger capacity (--ctx)",
      capacity_,
      T,
      position());
}

void Engine::note_step(const std::vector<int64_t>& ids) {
  best_k_ = 0;
  for (size_t row = 0; row < ids.size(); ++row) {
    history_[row].push_back(ids[row]);
  }
}

void Engine::append_rows(const int64_t* ids, int64_t T) {
  check_room(T);
  for (int64_t i = 0; i < batch_ * T; ++i) {
    check(ids[i] >= 0 && ids[i] < vocab_size_,
          "[append] token id: expected 0 to {}, got {} (token {} of row {})",
          vocab_size_ - 1,
          ids[i],
          i % T,
          i / T);
  }
  const auto start = position();
  best_k_ = 0;
  do_append(ids, T);
  for (int64_t row = 0; row < batch_; ++row) {
    const auto skipped = std::clamp(padding_[static_cast<size_t>(row)] - start, int64_t{0}, T);
    const int64_t* begin = ids + row * T;
    history_[static_cast<size_t>(row)].insert(
        history_[static_cast<size_t>(row)].end(), begin + skipped, begin + T);
  }
}

void Engine::check_targets(const at::Tensor& targets, int64_t T) const {
  check(T > 0, "[log_prob] expected an append since the last reset or rewind, got none");
  check(targets.dim() == 2 && targets.size(0) == batch_ && targets.size(1) == T,
        "[log_prob] targets: expected ({}, {}), got {}",
        batch_,
        T,
        shape_str(targets.sizes()));
}

TopK Engine::top(int64_t k) {
  check(k >= 1, "[top] k: expected at least 1, got {}", k);
  const auto places = std::min(k, vocab_size_);
  TopK top{at::empty({batch_, places}, at::kLong), at::empty({batch_, places}, at::kFloat)};
  auto* ids = top.ids.mutable_data_ptr<int64_t>();
  auto* logits = top.logits.mutable_data_ptr<float>();
  for (int64_t row = 0; row < batch_; ++row) {
    for (const auto& [id, logit] : best(places, row)) {
      *ids++ = id;
      *logits++ = logit;
    }
  }
  return top;
}

// Found once a step for all rows: each of them asks.
std::span<const Candidate> Engine::best(int64_t k, int64_t row) {
  if (best_k_ < k) {
    best_k_ = 0;
    do_top(k, best_);
    best_k_ = k;
  }
  return {best_.data() + row * best_k_, static_cast<size_t>(k)};
}

void Engine::do_top(int64_t k, std::vector<Candidate>& best) {
  auto last = logits(Rows::kLast).squeeze(/*dim=*/1);  // (B, V)
  if (last.is_mps()) {
    last = last.to(at::kCPU);  // the same memory, and 64-bit sorting is not everywhere
  }
  const auto [ids, values] = best_of(last, k);
  // Read at once, since each read waits for the device: doubles hold both exactly.
  const auto read = at::stack({ids.to(at::kDouble), values.to(at::kDouble)}).to(at::kCPU);
  const auto* id = read.const_data_ptr<double>();
  const auto* logit = id + ids.numel();
  best.clear();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    best.push_back({static_cast<int64_t>(id[i]), static_cast<float>(logit[i])});
  }
}

void Engine::rewind(int64_t position) {
  best_k_ = 0;
  do_rewind(position);
  for (size_t row = 0; row < history_.size(); ++row) {
    const auto kept = std::max(int64_t{0}, position - padding_[row]);
    history_[row].resize(std::min(history_[row].size(), static_cast<size_t>(kept)));
  }
}

void Engine::reset(const at::Tensor& first) {
  check(!first.defined() ||
            (first.dim() == 1 && first.size(0) == batch_ && first.scalar_type() == at::kLong),
        "[reset] first: expected ({}) int64, got {} {}",
        batch_,
        first.defined() ? shape_str(first.sizes()) : "",
        first.defined() ? c10::toString(first.scalar_type()) : "");
  best_k_ = 0;
  do_reset(first);
  for (int64_t row = 0; row < batch_; ++row) {
    history_[static_cast<size_t>(row)].clear();
    padding_[static_cast<size_t>(row)] = first.defined() ? first[row].item<int64_t>() : 0;
  }
}

void Engine::copy_from(const Engine& other) {
  check(other.batch_ == batch_ && other.vocab_size_ == vocab_size_ && other.position() <= capacity_,
        "[copy_from] expected an engine of batch {} with at most {} tokens, got batch {} with {}",
        batch_,
        capacity_,
        other.batch_,
        other.position());
  best_k_ = 0;
  do_copy_from(other);
  history_ = other.history_;
  padding_ = other.padding_;
}

const std::vector<Candidate>& Engine::candidates(int64_t row, const Sampling& sampling) {
  // More than k are asked for at first because bfloat16 logits are often equal at the k-th place.
  constexpr int64_t kSpare = 4;
  const bool penalised = sampling.repetition_penalty != 1;
  const auto all = vocab_size_;
  const int64_t wanted = sampling.temperature == 0 ? 1 : sampling.top_k > 0 ? sampling.top_k : all;
  int64_t asked = sampling.temperature == 0 ? 1 : std::min(all, wanted + kSpare);
  if (penalised) {
    // A penalty above 1 only lowers the logits of m known tokens: the best k are among the best k + m. Below 1 it
    // may raise any of them.
    seen_.assign(history(row));
    asked = sampling.repetition_penalty > 1 ? asked + seen_.size() : all;
  }
  for (;; asked *= 2) {
    asked = std::min(asked, all);
    const auto found = best(asked, row);
    candidates_.assign(found.begin(), found.end());
    const float lowest = candidates_.back().logit;
    if (penalised) {
      apply_repetition_penalty(candidates_, seen_, sampling.repetition_penalty);
    }
    // Complete once no token that was left out can equal the last one that counts.
    const bool complete =
        asked == all || candidates_[static_cast<size_t>(wanted - 1)].logit > lowest;
    if (complete || sampling.temperature == 0) {
      return candidates_;
    }
  }
}

void Engine::decode(int64_t n, const Sampling& sampling, const OnToken& on_token) {
  check_sampling(sampling);
  Draws draws(sampling, batch_);
  std::vector<bool> active(static_cast<size_t>(batch_), true);
  std::vector<int64_t> next(static_cast<size_t>(batch_));
  std::vector<double> probabilities;
  for (int64_t step = 0; step < n; ++step) {
    const auto& places = draws.next();
    for (int64_t row = 0; row < batch_; ++row) {
      const auto index = static_cast<size_t>(row);
      const auto id = draw(candidates(row, sampling), sampling, places[index], probabilities);
      next[index] = id;
      active[index] = active[index] && on_token(row, id);
    }
    if (step + 1 == n || std::find(active.begin(), active.end(), true) == active.end()) {
      return;
    }
    append_rows(next.data(), /*T=*/1);
  }
}

std::string EngineReport::quant() const {
  const bool own = weights == "float32" || weights == "bfloat16" || weights == "lossless12";
  return own ? "none" : weights;
}

std::vector<KernelTime> Engine::profile() const {
  fail("[profile] expected the fused engine, got {}", report(0).engine);
}

namespace {

constexpr std::pair<const char*, EngineKind> kKinds[] = {{"auto", EngineKind::kAuto},
                                                         {"eager", EngineKind::kEager},
                                                         {"fused", EngineKind::kFused},
                                                         {"traced", EngineKind::kTraced},
                                                         {"graph", EngineKind::kGraph}};

const char* engine_name(EngineKind kind) {
  return kKinds[static_cast<size_t>(kind)].first;
}

}  // namespace

EngineKind parse_engine(const std::string& name) {
  for (const auto& [known, kind] : kKinds) {
    if (name == known) {
      return kind;
    }
  }
  fail("[engine] expected auto, eager, fused, traced or graph, got {}", name);
}

EngineKind choose_engine(const Gemma3Model& model, const EngineOptions& options) {
  if (options.kind != EngineKind::kAuto) {
    return options.kind;
  }
  return options.probe || !Pack::refusal(model).empty() ? EngineKind::kEager : EngineKind::kFused;
}

std::unique_ptr<Engine> make_engine(Gemma3Model model, const EngineOptions& options) {
  if (!options.cached) {
    check(options.kind != EngineKind::kGraph,
          "[graph] expected a cache, which its graphs write, got none. Hint: --engine eager");
    auto inner = options;
    inner.cached = true;
    return std::make_unique<RecomputeEngine>(make_engine(std::move(model), inner));
  }
  const auto kind = choose_engine(model, options);
  check(options.traced_file.empty() || kind == EngineKind::kTraced,
        "[traced] {}: expected --engine traced to run it, got another",
        options.traced_file);
  if (kind == EngineKind::kFused) {
    return std::make_unique<FusedEngine>(std::move(model), options);
  }
  check(options.fused.quant == OnTheFly::kNone,
        "[quant] expected none for the {} engine, got int8. Hint: --engine fused",
        engine_name(kind));
  check(!options.probe || kind == EngineKind::kEager,
        "[{}] expected no probe, got one. Hint: --engine eager",
        engine_name(kind));
  if (kind == EngineKind::kTraced) {
    return std::make_unique<TracedEngine>(std::move(model), options);
  }
  if (kind == EngineKind::kGraph) {
    const auto device = model->tok_emb->weight.device();
    return std::make_unique<GraphEngine>(std::move(model), options, cuda_recorder(device));
  }
  return std::make_unique<EagerEngine>(std::move(model), options);
}

}  // namespace gemma_torch
