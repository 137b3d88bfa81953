#include "gemma_torch/engine/fused.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "gemma_torch/base/error.h"
#include "gemma_torch/base/memory.h"
#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/engine/fused_chunk.h"
#include "gemma_torch/engine/fused_top.h"

namespace gemma_torch {
namespace {

using kernels::Format;
using kernels::kMaxRows;

kernels::Isa isa_of(const EngineOptions& options) {
  const auto isa = options.fused.isa.value_or(kernels::best_isa());
  check(kernels::has_isa(isa),
        "[isa] expected one that this CPU has, got {}",
        kernels::isa_name(isa));
  return isa;
}

KvCacheOptions cache_options(const EngineOptions& options) {
  return {.batch = options.batch,
          .capacity = options.capacity,
          .chunk = options.chunk,
          .device = c10::kCPU,
          .dtype = options.kv_dtype.value_or(c10::kBFloat16),
          .paired = true};
}

std::vector<float> inverse_frequencies(int64_t head_dim, double base, double scaling) {
  std::vector<float> frequencies;
  for (int64_t j = 0; j < head_dim; j += 2) {
    // Rounded where compute_rope_params rounds.
    const auto exponent = static_cast<float>(j) / static_cast<float>(head_dim);
    const auto power = std::pow(static_cast<float>(base), exponent);
    frequencies.push_back(1.0F / power / static_cast<float>(scaling));
  }
  return frequencies;
}

int threads_of(const EngineOptions& options) {
  return options.fused.threads > 0 ? options.fused.threads : at::get_num_threads();
}

}  // namespace

FusedEngine::Buffers::Buffers(const Gemma3Config& cfg, int threads, int64_t chunk) {
  const auto E = cfg.emb_dim, D = cfg.head_dim, H = cfg.n_heads, G = cfg.n_kv_groups,
             F = cfg.hidden_dim;
  const auto widest = std::max({E, H * D, F});
  for (int i = 0; i < threads; ++i) {
    workers.emplace_back(widest);
  }
  PageArrays arrays;
  // What fetches ahead by itself goes on past the end of an array that a thread runs over. If another thread's began
  // there, lines that it writes would be taken from it each time, which is slow between cores that share no cache.
  constexpr size_t kApart = 4096;
  for (auto& w : workers) {
    for (auto* array : {&w.x, &w.h, &w.out_part, &w.down_part}) {
      arrays.add(*array, kMaxRows * E);
    }
    for (auto* array : {&w.q, &w.z, &w.z_part}) {
      arrays.add(*array, kMaxRows * H * D);
    }
    arrays.add(w.qkv, (H + 2 * G) * D);
    arrays.add(w.qkv_part, kMaxRows * (H + 2 * G) * D);
    arrays.add(w.k, kMaxRows * G * D);
    arrays.add(w.gate_up, kMaxRows * 2 * F);
    arrays.add(w.act, kMaxRows * F);
    arrays.add(w.largest_part, kMaxRows * H);
    arrays.add(w.sum_part, kMaxRows * H);
    arrays.skip(kApart);
  }
  for (int full = 0; full < 2; ++full) {
    arrays.add(cos[full], chunk * D / 2);
    arrays.add(sin[full], chunk * D / 2);
  }
  memory_ = arrays.allocate();
}

FusedEngine::FusedEngine(Gemma3Model model, const EngineOptions& options)
    : Engine(options.batch, options.capacity, model->cfg.vocab_size),
      options_(options),
      model_(std::move(model)),
      kernel_(kernels::fused_kernels(isa_of(options))),
      bf16_products_(options.fused.products.has_value() ? *options.fused.products == c10::kBFloat16
                                                        : kernel_.fast_bf16),
      format_(options.fused.quant == OnTheFly::kInt8 ? Format::kInt8 : Format::kLossless12),
      team_(threads_of(options), options.fused.pin),
      cache_(model_->cfg, cache_options(options)),
      first_(static_cast<size_t>(options.batch), 0) {
  check(!options.probe, "[fused] probes: expected none. Hint: --engine eager");
  const auto& cfg = model_->cfg;
  inv_freq_[0] = inverse_frequencies(cfg.head_dim, cfg.rope_local_base, 1.0);
  inv_freq_[1] = inverse_frequencies(cfg.head_dim, cfg.rope_base, cfg.rope_scaling);
  if (options.fused.profile) {
    clock_.enable();
  }
  pack_ = std::move(options_.fused.pack);
  if (!pack_) {
    repack();
  }
  check(pack_->fits(model_, format_, team_.size()),
        "[fused] pack: expected one of this model in {} for {} threads, got one in {} for {}, or "
        "of another model",
        kernels::format_name(format_),
        team_.size(),
        pack_->format(),
        pack_->threads());
  buffers_ = std::make_unique<Buffers>(cfg, team_.size(), options.chunk);
  chunks_ = std::make_unique<Chunks>();
}

FusedEngine::~FusedEngine() = default;

void FusedEngine::repack() {
  pack_ = std::make_shared<const Pack>(model_, format_, team_.size());
}

void FusedEngine::ensure_current() {
  if (!pack_->is_current()) {
    repack();
  }
}

void FusedEngine::embed(const Pass& pass, int64_t row, float* x) const {
  const auto E = model_->cfg.emb_dim;
  const auto id = pass.ids[row / pass.T * pass.ids_stride + row % pass.T];
  kernel_.from_bf16(pack_->embedding() + id * E, x, E);
  const auto scale = std::sqrt(static_cast<float>(E));
  for (int64_t j = 0; j < E; ++j) {
    x[j] *= scale;
  }
}

int64_t FusedEngine::qkv_width() const {
  return (model_->cfg.n_heads + 2 * model_->cfg.n_kv_groups) * model_->cfg.head_dim;
}

// Thread i's share of them. They are needed first after the first barrier.
void FusedEngine::fill_angles(const Pass& pass, int i) {
  const auto half = model_->cfg.head_dim / 2;
  const auto share = team_.share(2 * pass.T, i);
  for (int64_t n = share.begin; n < share.end; ++n) {
    const auto full = static_cast<size_t>(n / pass.T);
    const auto t = n % pass.T;
    float* const cos = buffers_->cos[full].data() + t * half;
    float* const sin = buffers_->sin[full].data() + t * half;
    for (int64_t j = 0; j < half; ++j) {
      const float angle =
          static_cast<float>(pass.position + t) * inv_freq_[full][static_cast<size_t>(j)];
      cos[j] = std::cos(angle);
      sin[j] = std::sin(angle);
    }
  }
}

void FusedEngine::do_append(const int64_t* ids, int64_t total) {
  ensure_current();
  const auto E = model_->cfg.emb_dim;
  hidden_tokens_ = 0;
  last_.clear();
  last_logits_ = at::Tensor();
  hidden_.resize(static_cast<size_t>(batch() * total * E));
  const auto most = std::max<int64_t>(1, options_.chunk / batch());
  std::vector<float> part;  // of several rows, in parts: (B, T, E) to be put in place
  for (int64_t start = 0; start < total; start += most) {
    const Pass pass{ids + start, total, std::min(most, total - start), position()};
    const bool whole = batch() == 1 || pass.T == total;
    if (!whole) {
      part.resize(static_cast<size_t>(batch() * pass.T * E));
    }
    float* hidden = whole ? hidden_.data() + start * E : part.data();
    cache_.occupy(pass.T);
    pass.rows(batch()) <= kMaxRows ? run_rows(pass, hidden) : run_chunk(pass, hidden);
    cache_.advance(pass.T);
    for (int64_t b = 0; !whole && b < batch(); ++b) {
      std::copy_n(
          part.data() + b * pass.T * E, pass.T * E, hidden_.data() + (b * total + start) * E);
    }
  }
  hidden_tokens_ = total;
}

void FusedEngine::do_rewind(int64_t position) {
  cache_.rewind(position);
  hidden_tokens_ = 0;
}

void FusedEngine::do_reset(const at::Tensor& first) {
  cache_.reset(first);
  hidden_tokens_ = 0;
  for (int64_t b = 0; b < batch(); ++b) {
    first_[static_cast<size_t>(b)] = first.defined() ? first[b].item<int64_t>() : 0;
  }
}

void FusedEngine::do_copy_from(const Engine& other) {
  const auto* fused = dynamic_cast<const FusedEngine*>(&other);
  check(fused != nullptr, "[copy_from] expected a fused engine, got another kind");
  cache_.copy_from(fused->cache_);
  first_ = fused->first_;
  hidden_ = fused->hidden_;
  hidden_tokens_ = fused->hidden_tokens_;
  last_ = fused->last_;
  last_logits_ = fused->last_logits_;
}

EngineReport FusedEngine::report(int64_t depth) const {
  const auto& cfg = model_->cfg;
  int64_t bytes = pack_->layer_bytes() + cache_.bytes_seen(depth);
  const auto scan = pack_->scan();
  bytes += options_.fused.two_stage_head ? scan.rows / kernels::kBlockRows * scan.stride()
                                         : cfg.vocab_size * cfg.emb_dim * 2;
  return {"fused", kernels::isa_name(kernel_.isa), pack_->format(), team_.size(), bytes};
}

}  // namespace gemma_torch
