#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "gemma_torch/engine/device_sampler.h"
#include "gemma_torch/engine/hidden_engine.h"

namespace gemma_torch {

/// Does recorded work again, on the very tensors that it was recorded with.
using Replay = std::function<void()>;
using Work = std::function<void()>;

/// Records work. May run it for real before that, each time after `restore`, and calls `restore` last.
using Recorder = std::function<Replay(const Work& work, const Work& restore)>;

/// Records on a CUDA device, as a captured graph. Throws: Error saying why there can be none (graph_refusal).
Recorder cuda_recorder(c10::Device device);

/// Why no graph can be captured for weights on this device; empty where one can.
std::string graph_refusal(c10::Device device);

/// Runs the modules, and decode() as recorded work: `launch_steps` tokens are made on the device, each from the one before,
/// between two readings by the host. Token, place in the cache and choice stay on the device; the draws are those of
/// Engine::decode, which gives the same tokens. append() runs the modules kernel by kernel.
class GraphEngine : public HiddenEngine {
 public:
  /// Throws: Error for launch_steps below 1 or above the chunk.
  GraphEngine(Gemma3Model model, const EngineOptions& options, Recorder recorder);

  /// As Engine::decode. Recorded anew when the sampling differs by more than the seed from the last call's.
  void decode(int64_t n, const Sampling& sampling, const OnToken& on_token) override;
  EngineReport report(int64_t depth) const override;

 private:
  class Decoding;

  at::Tensor run(const at::Tensor& ids) override;
  at::Tensor head(const at::Tensor& x) override;

  void prepare(const Sampling& sampling);
  void step();
  const int64_t* launch(int64_t steps);
  void record(int64_t steps);
  void place_token();
  void settle(int64_t start, int64_t kept, int64_t written);

  Gemma3Model model_;
  Recorder recorder_;
  int64_t launch_steps_;
  Sampling sampling_;                       // that of replays_, the seed not counted
  std::unique_ptr<DeviceSampler> sampler_;  // null before the first decode
  std::map<int64_t, Replay> replays_;       // by the number of steps

  // On the device, the same ones for good. (B, 1) and (1) int64 of the step to come, (1) which of the launch it is:
  at::Tensor token_, position_, step_;
  at::Tensor places_, chosen_;             // (steps, B) float64 and int64
  at::Tensor hidden_steps_, hidden_last_;  // (steps, B, E) and (B, 1, E)
  at::Tensor host_token_, host_places_,
      host_chosen_;  // what is sent and read, in memory that is never paged out
};

}  // namespace gemma_torch
