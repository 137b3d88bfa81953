#include "bench_run.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <utility>

#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/base/fingerprint.h"

namespace gemma_torch::apps {
namespace {

using Clock = std::chrono::steady_clock;

int64_t tokens_needed(const BenchTest& test) {
  return test.n_depth + test.n_prompt + test.n_gen;
}

// A generation starts from a token of its own.
int64_t tokens_read(const BenchTest& test) {
  return test.n_depth + test.n_prompt + (test.n_gen > 0 ? 1 : 0);
}

bool same_engine(const BenchTest& a, const BenchTest& b) {
  return a.n_threads == b.n_threads && a.n_ubatch == b.n_ubatch && a.n_sequences == b.n_sequences;
}

// A dense model takes the same time for all tokens, but for the choice among the k most likely: after tokens that are no
// text, many more of them are about as likely. Fixed, so that runs are alike.
at::Tensor some_ids(int64_t rows, int64_t count, int64_t vocab_size) {
  std::mt19937_64 random(1);
  auto ids = at::empty({rows, count}, at::kLong);
  auto* data = ids.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    data[i] = static_cast<int64_t>(random() % static_cast<uint64_t>(vocab_size));
  }
  return ids;
}

uint64_t hash_of(const at::Tensor& logits) {
  const auto values = logits.to(at::kCPU, at::kFloat).contiguous();
  Fingerprint hash;
  hash.add(values.const_data_ptr(), values.nbytes());
  return hash.value();
}

}  // namespace

BenchRunner::BenchRunner(const Pretrained& loaded,
                         ModelOptions options,
                         std::vector<BenchTest> tests,
                         const BenchHow& how)
    : loaded_(loaded), options_(std::move(options)), tests_(std::move(tests)), how_(how) {
  check(options_.ctx >= 0, "[ctx] expected at least 1, got {}", options_.ctx);
  for (const auto& test : tests_) {
    check(options_.ctx == 0 || tokens_needed(test) <= options_.ctx,
          "[ctx] expected at least {} for {}, got {}",
          tokens_needed(test),
          test_name(test),
          options_.ctx);
    const auto given = static_cast<int64_t>(how_.ids.size());
    check(given == 0 || tokens_read(test) <= given,
          "[bench] text: expected at least {} tokens for {}, got {}",
          tokens_read(test),
          test_name(test),
          given);
  }
}

BenchResult BenchRunner::run(const BenchTest& test, const std::function<void()>& beside) {
  BenchResult result;
  const auto short_test = [&] {
    auto warm_up = test;
    warm_up.n_gen = std::min<int64_t>(test.n_gen, 4);
    return warm_up;
  }();
  if (how_.profile) {  // apart from what is timed
    prepare(test, /*profile=*/true);
    engine_->profile();  // fails before any work where the engine has none
    once(short_test);
    once(test);
    result.kernels = engine_->profile();
  }
  prepare(test, /*profile=*/false);
  once(short_test);
  beside();
  const auto device = loaded_.model->tok_emb->weight.device();
  for (int i = 0; i < how_.repetitions; ++i) {
    reset_peak_device_memory(device);
    const auto sample = once(test);
    // Before the memory's speed is measured, which takes some of it.
    result.peak_device_memory =
        std::max(result.peak_device_memory, peak_device_memory_bytes(device));
    beside();
    result.seconds.push_back(sample.seconds);
    result.first_token_seconds.push_back(sample.first_token_seconds);
  }
  if (how_.hash) {
    result.hash = hash_of(engine_->logits(Rows::kLast));
  }
  const auto middle = test.n_depth + (test.n_gen + 1) / 2;  // of the generation
  result.engine = engine_->report(middle);
  result.peak_memory = peak_memory_bytes();
  result.any_tokens = how_.ids.empty();
  return result;
}

void BenchRunner::prepare(const BenchTest& test, bool profile) {
  if (engine_ && profiles_ == profile && same_engine(made_for_, test)) {
    return;
  }
  engine_.reset();  // first: two at once would be in the peak memory
  at::set_num_threads(static_cast<int>(test.n_threads));
  auto how = engine_options(loaded_, options_, capacity_for(test), test.n_sequences);
  how.chunk = test.n_ubatch;
  how.fused.threads = static_cast<int>(test.n_threads);
  how.fused.profile = profile;
  engine_ = gemma_torch::make_engine(loaded_.model, how);
  made_for_ = test;
  profiles_ = profile;
}

int64_t BenchRunner::capacity_for(const BenchTest& test) const {
  int64_t capacity = options_.ctx;
  for (const auto& other : tests_) {
    if (options_.ctx == 0 && same_engine(other, test)) {
      capacity = std::max(capacity, tokens_needed(other));
    }
  }
  return capacity;
}

// (B, count): every row reads the same text.
at::Tensor BenchRunner::next_ids(int64_t count) {
  if (how_.ids.empty()) {
    return some_ids(engine_->batch(), count, engine_->vocab_size());
  }
  const auto row = at::from_blob(how_.ids.data() + taken_, {1, count}, at::kLong);
  taken_ += count;
  return row.expand({engine_->batch(), count}).contiguous();
}

void BenchRunner::read(int64_t count, int64_t piece) {
  const auto ids = next_ids(count);
  for (int64_t start = 0; start < count; start += piece) {
    engine_->append(ids.narrow(/*dim=*/1, start, std::min(piece, count - start)));
  }
}

// Reads n_prompt tokens, then makes n_gen. A token made is one pass and one choice, as in
// llama-bench: the first one follows a token of its own, and so costs a pass too.
BenchRunner::Sample BenchRunner::once(const BenchTest& test) {
  const auto device = loaded_.model->tok_emb->weight.device();
  engine_->reset();
  taken_ = 0;
  read(test.n_depth, test.n_batch);
  if (profiles_) {
    engine_->reset_profile();  // the depth does not count
  }
  synchronize(device);
  Sample sample;
  const auto start = Clock::now();
  const auto seconds = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  if (test.n_prompt > 0) {
    read(test.n_prompt, test.n_batch);
    engine_->top(/*k=*/1);
    sample.first_token_seconds = seconds();
  }
  if (test.n_gen > 0) {
    const Sampling sampling{.temperature = test.top_k == 1 ? 0.0 : 1.0, .top_k = test.top_k};
    read(/*count=*/1, test.n_batch);
    engine_->decode(test.n_gen, sampling, [&](int64_t, int64_t) {
      if (sample.first_token_seconds == 0) {
        sample.first_token_seconds = seconds();
      }
      return true;
    });
  }
  synchronize(device);
  sample.seconds = seconds();
  return sample;
}

}  // namespace gemma_torch::apps
