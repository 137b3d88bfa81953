// The one file of the library that calls CUDA: built with a LibTorch that has it, and compiled against its headers by
// the tests of one that has not.
#include <ATen/Context.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "gemma_torch/base/error.h"
#include "gemma_torch/engine/graph.h"

namespace gemma_torch {
namespace {

// What kernels set up when they first run (handles, workspaces, code to load) must not happen while a graph is captured.
constexpr int kWarmUps = 3;

void capture(at::cuda::CUDAGraph& graph, const Work& work) {
  // Of this thread only: another one's allocations do not spoil it.
  graph.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
  try {
    work();
  } catch (...) {
    try {
      graph.capture_end();  // else the stream captures for good
    } catch (...) {         // of the two the first is worth telling
    }
    throw;
  }
  graph.capture_end();
}

Replay record(c10::Device device, const Work& work, const Work& restore) {
  const c10::cuda::CUDAGuard on_device(device);
  const auto stream = c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index());
  // A capture moves the default generator's state, though nothing draws from it.
  auto generator = at::globalContext().defaultGenerator(device);
  const auto random = generator.get_state();
  c10::cuda::getCurrentCUDAStream(device.index()).synchronize();
  const auto graph = std::make_shared<at::cuda::CUDAGraph>();
  {
    const c10::cuda::CUDAStreamGuard on_stream(stream);  // the default one cannot be captured
    for (int i = 0; i < kWarmUps; ++i) {
      restore();
      work();
    }
    restore();
    stream.synchronize();
    capture(*graph, work);
  }
  generator.set_state(random);
  return [graph, device] {
    const c10::cuda::CUDAGuard here(device);
    graph->replay();
  };
}

}  // namespace

Recorder cuda_recorder(c10::Device device) {
  check(device.is_cuda(), "[graph] {}", graph_refusal(device));
  return [device](const Work& work, const Work& restore) { return record(device, work, restore); };
}

}  // namespace gemma_torch
