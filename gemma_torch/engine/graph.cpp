#include "gemma_torch/engine/graph.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <deque>

#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/engine/eager.h"

namespace gemma_torch {
namespace {

bool same_but_seed(Sampling a, const Sampling& b) {
  a.seed = b.seed;
  return a == b;
}

}  // namespace

#ifndef GEMMA_TORCH_CUDA  // graph_cuda.cpp is not built
Recorder cuda_recorder(c10::Device device) {
  fail("[graph] {}", graph_refusal(device));
}
#endif

std::string graph_refusal(c10::Device device) {
#ifdef GEMMA_TORCH_CUDA
  return device.is_cuda() ? "" : "captured graphs need a CUDA device, got " + device.str();
#else
  return "this build has no CUDA, which captured graphs need; the weights are on " + device.str();
#endif
}

GraphEngine::GraphEngine(Gemma3Model model, const EngineOptions& options, Recorder recorder)
    : HiddenEngine(model->cfg, cache_options(options, model->tok_emb->weight, /*fixed=*/true)),
      model_(std::move(model)),
      recorder_(std::move(recorder)),
      launch_steps_(options.launch_steps) {
  check(launch_steps_ >= 1 && launch_steps_ <= options.chunk,
        "[graph] tokens of a launch: expected 1 to {}, got {}",
        options.chunk,
        launch_steps_);
  const auto device = cache_.options().device;
  const std::vector<int64_t> sizes{launch_steps_, batch()};
  const auto index = at::TensorOptions(at::kLong).device(device);
  const auto real = index.dtype(at::kDouble);
  token_ = at::zeros({batch(), 1}, index);
  position_ = at::zeros({1}, index);
  step_ = at::zeros({1}, index);
  places_ = at::zeros(sizes, real);
  chosen_ = at::zeros(sizes, index);
  const auto states = model_->tok_emb->weight.options().requires_grad(false);
  hidden_steps_ = at::zeros({launch_steps_, batch(), model_->cfg.emb_dim}, states);
  hidden_last_ = at::zeros({batch(), 1, model_->cfg.emb_dim}, states);
  const auto on_host = [&](const at::TensorOptions& how) {
    return how.device(at::kCPU).pinned_memory(device.is_cuda());
  };
  host_token_ = at::zeros({batch(), 1}, on_host(index));
  host_places_ = at::zeros(sizes, on_host(real));
  host_chosen_ = at::zeros(sizes, on_host(index));
}

at::Tensor GraphEngine::run(const at::Tensor& ids) {
  return model_->hidden(ids, &cache_);
}

at::Tensor GraphEngine::head(const at::Tensor& x) {
  return model_->out_head(x);
}

// One token: nothing here but work on the device, over tensors that stay.
void GraphEngine::step() {
  sampler_->append(token_);
  const auto x = model_->hidden(token_, cache_.place(position_), &cache_);  // (B, 1, E)
  const auto logits = head(x).to(at::kFloat).squeeze(/*dim=*/1);            // (B, V)
  const auto places = places_.index_select(/*dim=*/0, step_).squeeze(/*dim=*/0);
  const auto chosen = sampler_->choose(logits, places);
  chosen_.index_copy_(/*dim=*/0, step_, chosen.unsqueeze(/*dim=*/0));
  hidden_steps_.index_copy_(/*dim=*/0, step_, x.transpose(0, 1));
  token_.copy_(chosen.clamp_min(0).unsqueeze(/*dim=*/1));  // -1: the host goes back to this step
  position_.add_(1);
  step_.add_(1);
}

void GraphEngine::prepare(const Sampling& sampling) {
  if (!sampler_ || !same_but_seed(sampling_, sampling)) {
    replays_.clear();
    sampler_ =
        std::make_unique<DeviceSampler>(sampling, batch(), vocab_size(), cache_.options().device);
    sampling_ = sampling;
  }
}

void GraphEngine::place_token() {
  token_.copy_(host_token_, /*non_blocking=*/true);
  position_.fill_(position());
}

void GraphEngine::record(int64_t steps) {
  const auto seen = sampler_->seen().defined() ? sampler_->seen().clone() : at::Tensor();
  const auto work = [this, steps] {
    step_.zero_();
    for (int64_t i = 0; i < steps; ++i) {
      step();
    }
  };
  replays_[steps] = recorder_(work, [&] {
    place_token();
    if (seen.defined()) {
      sampler_->seen().copy_(seen);
    }
  });
}

// Appends host_token_ and goes on alone for so many steps, with host_places_. Gives what was chosen, (steps, B).
const int64_t* GraphEngine::launch(int64_t steps) {
  const c10::InferenceMode inference;
  places_.copy_(host_places_, /*non_blocking=*/true);
  if (replays_.contains(steps)) {
    place_token();
  } else {
    record(steps);
  }
  replays_.at(steps)();
  host_chosen_.copy_(chosen_);  // the one call that waits for the device
  return host_chosen_.const_data_ptr<int64_t>();
}

// Of `written` tokens from `start` on, the first `kept` were appended; those after them are forgotten.
void GraphEngine::settle(int64_t start, int64_t kept, int64_t written) {
  const c10::InferenceMode inference;
  cache_.advance(start + written - cache_.position());
  if (kept < written) {
    cache_.rewind(start + kept);
  }
  hidden_last_.copy_(hidden_steps_.select(/*dim=*/0, kept - 1).unsqueeze(/*dim=*/1));
  set_hidden(hidden_last_);
}

// A call of decode: which rows go on, and the numbers that they draw with.
class GraphEngine::Decoding {
 public:
  Decoding(GraphEngine& engine, const Sampling& sampling, const OnToken& on_token)
      : engine_(engine),
        sampling_(sampling),
        on_token_(on_token),
        draws_(sampling, engine.batch()),
        active_(static_cast<size_t>(engine.batch()), true) {}

  bool going() const {  // whether a row is
    return std::find(active_.begin(), active_.end(), true) != active_.end();
  }

  // Chooses from the last logits, on the host.
  void choose() {
    draw_ahead(1);
    std::vector<double> shares;
    std::vector<int64_t> ids;
    for (int64_t row = 0; row < engine_.batch(); ++row) {
      const auto place = places_.front()[static_cast<size_t>(row)];
      ids.push_back(draw(engine_.candidates(row, sampling_), sampling_, place, shares));
    }
    tell(std::move(ids));
  }

  // Makes up to `steps` tokens a row, fewer where no row goes on or the host had to choose. Gives how many.
  int64_t launch(int64_t steps) {
    const auto start = engine_.position();
    send(steps);
    const auto* made = engine_.launch(steps);
    int64_t kept = 0;
    bool undecided = false;
    try {
      while (kept < steps && going() && !undecided) {
        engine_.note_step(tokens_);
        engine_.cache_.advance(1);
        const auto* ids = made + kept++ * engine_.batch();
        const auto* end = ids + engine_.batch();
        undecided = std::find(ids, end, -1) != end;
        if (!undecided) {
          tell({ids, end});
        }
      }
    } catch (...) {  // the caller's
      engine_.settle(start, kept, steps);
      throw;
    }
    engine_.settle(start, kept, steps);
    if (undecided) {
      choose();
      engine_.sampler_->see(engine_.histories());
    }
    return kept;
  }

 private:
  // A number is drawn once, whatever becomes of a launch.
  void draw_ahead(int64_t steps) {
    while (static_cast<int64_t>(places_.size()) < steps) {
      places_.push_back(draws_.next());
    }
  }

  // Where the device takes them from: the tokens to append, and the numbers of the steps.
  void send(int64_t steps) {
    draw_ahead(steps);
    std::copy(tokens_.begin(), tokens_.end(), engine_.host_token_.mutable_data_ptr<int64_t>());
    auto* to = engine_.host_places_.mutable_data_ptr<double>();
    for (int64_t i = 0; i < steps; ++i) {
      const auto& row = places_[static_cast<size_t>(i)];
      to = std::copy(row.begin(), row.end(), to);
    }
  }

  void tell(std::vector<int64_t> ids) {
    tokens_ = std::move(ids);
    places_.pop_front();
    for (size_t row = 0; row < tokens_.size(); ++row) {
      active_[row] = active_[row] && on_token_(static_cast<int64_t>(row), tokens_[row]);
    }
  }

  GraphEngine& engine_;
  const Sampling& sampling_;
  const OnToken& on_token_;
  Draws draws_;
  std::deque<std::vector<double>> places_;  // of the tokens to come
  std::vector<bool> active_;                // B
  std::vector<int64_t> tokens_;             // B: chosen, not yet appended
};

void GraphEngine::decode(int64_t n, const Sampling& sampling, const OnToken& on_token) {
  check_sampling(sampling);
  if (n < 1) {
    return;
  }
  prepare(sampling);
  sampler_->see(histories());
  Decoding decoding(*this, sampling, on_token);
  decoding.choose();
  for (int64_t made = 1; made < n && decoding.going();) {
    check_room(1);
    const auto left = std::min(n - made, capacity() - position());
    made += decoding.launch(left >= launch_steps_ ? launch_steps_ : 1);
  }
}

EngineReport GraphEngine::report(int64_t /*depth*/) const {
  return {"graph",
          kernels_name(cache_.options().device, at::get_cpu_capability()),
          dtype_name(model_->tok_emb->weight.scalar_type()),
          at::get_num_threads(),
          step_bytes(model_) + cache_.bytes()};  // every slot is met
}

}  // namespace gemma_torch
