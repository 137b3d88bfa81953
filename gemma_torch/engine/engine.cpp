#include "gemma_torch/engine/engine.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <unordered_set>

#include "gemma_torch/base/error.h"
#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/engine/eager.h"
#include "gemma_torch/engine/fused.h"

namespace gemma_torch {
namespace {

std::vector<Candidate> row_of(const TopK& top, int64_t row) {
  const auto k = top.ids.size(1);
  const auto* ids = top.ids.const_data_ptr<int64_t>() + row * k;
  const auto* logits = top.logits.const_data_ptr<float>() + row * k;
  std::vector<Candidate> found;
  for (int64_t i = 0; i < k; ++i) {
    found.push_back({ids[i], logits[i]});
  }
  return found;
}

}  // namespace

Engine::Engine(int64_t batch, int64_t capacity, int64_t vocab_size)
    : batch_(batch),
      capacity_(capacity),
      vocab_size_(vocab_size),
      history_(static_cast<size_t>(batch)),
      padding_(static_cast<size_t>(batch), 0) {}

void Engine::append(const at::Tensor& given) {
  check(given.dim() == 2 && given.size(0) == batch_ && given.size(1) >= 1,
        "[append] ids: expected ({}, T) with T of at least 1, got {}",
        batch_,
        shape_str(given.sizes()));
  check(given.scalar_type() == at::kLong,
        "[append] ids: expected int64, got {}",
        c10::toString(given.scalar_type()));
  const auto T = given.size(1);
  check(
      position() + T <= capacity_,
      "[append] expected at most {} tokens, got {} at position {}. Hint: a larger capacity (--ctx)",
      capacity_,
      T,
      position());
  const auto ids = given.to(at::kCPU).contiguous();
  const int64_t* data = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    check(data[i] >= 0 && data[i] < vocab_size_,
          "[append] token id: expected 0 to {}, got {} (token {} of row {})",
          vocab_size_ - 1,
          data[i],
          i % T,
          i / T);
  }
  const auto start = position();
  do_append(ids);
  for (int64_t row = 0; row < batch_; ++row) {
    const auto skipped = std::clamp(padding_[static_cast<size_t>(row)] - start, int64_t{0}, T);
    const int64_t* begin = data + row * T;
    history_[static_cast<size_t>(row)].insert(
        history_[static_cast<size_t>(row)].end(), begin + skipped, begin + T);
  }
}

void Engine::append(const std::vector<int64_t>& ids) {
  append(at::tensor(ids, at::kLong).view({1, -1}));
}

TopK Engine::top(int64_t k) {
  check(k >= 1, "[top] k: expected at least 1, got {}", k);
  const auto last = logits(Rows::kLast).squeeze(/*dim=*/1);  // (B, V)
  if (k == 1) {
    const auto ids = last.argmax(/*dim=*/-1, /*keepdim=*/true);
    return {ids.to(at::kCPU), last.gather(/*dim=*/-1, ids).to(at::kCPU)};
  }
  const auto places = std::min(k, vocab_size());
  const auto worst = std::get<0>(last.topk(places, /*dim=*/-1)).narrow(/*dim=*/-1, places - 1, 1);
  std::vector<at::Tensor> ids, logits;
  for (int64_t row = 0; row < last.size(0); ++row) {
    // topk takes any of those that equal the k-th best: all of them in the order of their ids, then a stable sort.
    const auto reaching = last[row].ge(worst[row]).nonzero().squeeze(/*dim=*/1);
    const auto values = last[row].index_select(/*dim=*/0, reaching);
    const auto order = values.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/true)
                           .narrow(/*dim=*/0, /*start=*/0, places);
    ids.push_back(reaching.index_select(/*dim=*/0, order).to(at::kCPU));
    logits.push_back(values.index_select(/*dim=*/0, order).to(at::kCPU));
  }
  return {at::stack(ids), at::stack(logits)};
}

void Engine::rewind(int64_t position) {
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
  do_copy_from(other);
  history_ = other.history_;
  padding_ = other.padding_;
}

std::vector<Candidate> candidates(Engine& engine, int64_t row, const Sampling& sampling) {
  // More than k are asked for at first because bfloat16 logits are often equal at the k-th place.
  constexpr int64_t kSpare = 16;
  const bool penalised = sampling.repetition_penalty != 1;
  const auto all = engine.vocab_size();
  const auto& history = engine.history(row);
  const int64_t wanted = sampling.temperature == 0 ? 1 : sampling.top_k > 0 ? sampling.top_k : all;
  int64_t asked = sampling.temperature == 0 ? 1 : std::min(all, wanted + kSpare);
  if (penalised) {
    // A penalty above 1 only lowers the logits of m known tokens: the best k are among the best k + m. Below 1 it
    // may raise any of them.
    const std::unordered_set<int64_t> seen(history.begin(), history.end());
    asked = sampling.repetition_penalty > 1 ? asked + static_cast<int64_t>(seen.size()) : all;
  }
  for (;; asked *= 2) {
    asked = std::min(asked, all);
    auto found = row_of(engine.top(asked), row);
    const float lowest = found.back().logit;
    if (penalised) {
      apply_repetition_penalty(found, history, sampling.repetition_penalty);
    }
    // Complete once no token that was left out can equal the last one that counts.
    const bool complete = asked == all || found[static_cast<size_t>(wanted - 1)].logit > lowest;
    if (complete || sampling.temperature == 0) {
      return found;
    }
  }
}

void Engine::decode(int64_t n, const Sampling& sampling, const OnToken& on_token) {
  check_sampling(sampling);
  std::vector<std::mt19937_64> random;
  for (int64_t row = 0; row < batch_; ++row) {
    random.emplace_back(sampling.seed + static_cast<uint64_t>(row));
  }
  std::vector<bool> active(static_cast<size_t>(batch_), true);
  for (int64_t step = 0; step < n; ++step) {
    auto next = at::empty({batch_, 1}, at::kLong);
    for (int64_t row = 0; row < batch_; ++row) {
      const auto index = static_cast<size_t>(row);
      const auto id = draw(candidates(*this, row, sampling), sampling, random[index]);
      next.mutable_data_ptr<int64_t>()[row] = id;
      active[index] = active[index] && on_token(row, id);
    }
    if (step + 1 == n || std::find(active.begin(), active.end(), true) == active.end()) {
      return;
    }
    append(next);
  }
}

std::string EngineReport::quant() const {
  const bool own = weights == "float32" || weights == "bfloat16" || weights == "lossless12";
  return own ? "none" : weights;
}

std::vector<KernelTime> Engine::profile() const {
  fail("[profile] expected the fused engine, got {}", report(0).engine);
}

EngineKind parse_engine(const std::string& name) {
  check(name == "auto" || name == "eager" || name == "fused",
        "[engine] expected auto, eager or fused, got {}",
        name);
  return name == "auto"    ? EngineKind::kAuto
         : name == "eager" ? EngineKind::kEager
                           : EngineKind::kFused;
}

EngineKind choose_engine(const Gemma3Model& model, const EngineOptions& options) {
  if (options.kind != EngineKind::kAuto) {
    return options.kind;
  }
  return options.probe || !Pack::refusal(model).empty() ? EngineKind::kEager : EngineKind::kFused;
}

std::unique_ptr<Engine> make_engine(Gemma3Model model, const EngineOptions& options) {
  if (choose_engine(model, options) == EngineKind::kFused) {
    return std::make_unique<FusedEngine>(std::move(model), options);
  }
  check(options.fused.quant == OnTheFly::kNone,
        "[quant] expected none for the eager engine, got int8. Hint: --engine fused");
  return std::make_unique<EagerEngine>(std::move(model), options);
}

}  // namespace gemma_torch
