#pragma once

#include <memory>
#include <string>

#include "gemma_torch/engine/hidden_engine.h"

namespace gemma_torch {

/// Runs a TorchScript trace of the modules, whose cache is buffers of the script and whose positions are tensors, so
/// that one graph serves any number of tokens, cached or not. TorchScript is deprecated upstream: nothing but
/// make_engine and `gemma trace` knows of this file.
///
/// The script's methods, for C++ and for Python's torch.jit.load (ids (B, T) and positions (T) int64):
///   forward(ids, positions)           float32 logits (B, 1, V) after the last of at most `chunk` tokens that follow
///                                     those in the cache
///   forward_uncached(ids, positions)  the same of a whole sequence, without the cache
///   hidden(ids, positions)            (B, T, E) after final_norm, through the cache
///   head(x)                           (B, T, E) -> (B, T, V)
/// Attributes: batch, capacity, chunk, step_bytes; the cache's tensors, named as KvCache::state names them. A row's
/// positions count its padding, whose length is in `first`. Filling global_positions and local_positions with -1
/// empties the cache.
class TracedEngine : public HiddenEngine {
 public:
  /// Traces `model`, or loads options.traced_file, of which `model` then gives the shape and the device.
  /// Throws: Error for packed weights, a file that is no such trace, or one of another shape, batch or too few tokens.
  TracedEngine(Gemma3Model model, const EngineOptions& options);
  ~TracedEngine() override;

  EngineReport report(int64_t depth) const override;

 private:
  struct Script;
  TracedEngine(Gemma3Model model, const EngineOptions& options, std::unique_ptr<Script> loaded);

  at::Tensor run(const at::Tensor& ids) override;
  at::Tensor head(const at::Tensor& x) override;

  std::unique_ptr<Script> script_;
  std::string weights_;
};

/// Traces `model` for options.batch rows of options.capacity tokens and writes it to `path`, whole or not at all, with
/// `config` (the model's config.json) beside it in the file. Frozen, weights become constants of the graph.
/// Throws: Error for packed weights, or if the file cannot be written.
void save_trace(Gemma3Model model,
                const EngineOptions& options,
                bool freeze,
                const std::string& config,
                const std::string& path);

}  // namespace gemma_torch
