#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "gemma_torch/engine/kernel_clock.h"
#include "gemma_torch/engine/sampling.h"
#include "gemma_torch/kernels/cpu/isa.h"
#include "gemma_torch/model/gemma3.h"

namespace gemma_torch {

class Pack;  // quant/pack.h

enum class Rows { kLast, kAll };

/// The k best next tokens of each row, best first, the lower id of equals first. On the CPU.
struct TopK {
  at::Tensor ids;     // (B, k) int64
  at::Tensor logits;  // (B, k) float32
};

/// How an engine runs, for reports.
struct EngineReport {
  std::string engine;  // "eager", "fused", "traced", "graph"
  std::string
      isa;  // instruction set of its kernels; of eager, that of one-row products; of traced, ATen's; or "cuda", "mps"
  std::string
      weights;  // form of the layers' weights: "float32", "bfloat16", "lossless12", "int8", ..
  int threads = 1;
  /// "none" where the weights are the checkpoint's own, else their form.
  std::string quant() const;
  int64_t bytes_per_token = 0;  // that one step reads: layers, head, keys and values of every row
  bool cached = true;           // false: each step runs the whole sequence
};

/// Called with each new token of a row; false ends that row.
using OnToken = std::function<bool(int64_t row, int64_t id)>;

/// How forward passes run: owns the cache (and whatever else its kind needs) over a model that engines may share.
/// Rows of a batch advance together. Not thread-safe; two engines may run in two threads.
class Engine {
 public:
  virtual ~Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// Runs ids (B, T) int64, any T, into the cache. Forms no logits.
  /// Throws: Error for an id outside the vocabulary, another B, or more tokens than the capacity; before any work.
  void append(const at::Tensor& ids);
  void append(const std::vector<int64_t>& ids);  // the same for one row

  /// Logits after the last token, (B, 1, V), or after each token of the last append, (B, T, V); float32, on the
  /// engine's device. Throws: Error if nothing was appended since the last reset or rewind.
  virtual at::Tensor logits(Rows rows) = 0;

  /// The k best of the last position; exactly those of logits(Rows::kLast).
  TopK top(int64_t k);

  /// What `sampling` can choose from in one row, best first, the repetition penalty applied. Holds until the next call.
  const std::vector<Candidate>& candidates(int64_t row, const Sampling& sampling);

  /// Natural logarithm of the probability of targets (B, T), one for each token of the last append: (B, T) float32
  /// on the CPU, without a (T, V) tensor.
  virtual at::Tensor log_prob(const at::Tensor& targets) = 0;

  /// Forgets the tokens at or past `position`. Throws: Error where the cache has lost what would be needed.
  void rewind(int64_t position);

  /// Empties the engine. `first` (B) gives the left padding of each row to come; undefined: none.
  void reset(const at::Tensor& first = {});

  /// Takes over the tokens of another engine of the same kind and model, to go on from a shared prefix.
  void copy_from(const Engine& other);

  /// Chooses and appends up to n tokens a row, and tells `on_token` of each. Ends early when every row was ended.
  /// The last token chosen is not appended. Random draws are of `sampling.seed`, a stream for each row.
  virtual void decode(int64_t n, const Sampling& sampling, const OnToken& on_token);

  /// What it is, and what a step costs with `depth` tokens in the cache.
  virtual EngineReport report(int64_t depth) const = 0;

  /// Time by kernel since the last reset_profile, where EngineOptions::profile was set.
  /// Throws: Error if the engine has none.
  virtual std::vector<KernelTime> profile() const;
  virtual void reset_profile() {}

  virtual int64_t position() const = 0;  // tokens in the cache, padding included
  int64_t capacity() const { return capacity_; }
  int64_t batch() const { return batch_; }
  int64_t vocab_size() const { return vocab_size_; }

  /// The tokens of a row so far, without its padding.
  const std::vector<int64_t>& history(int64_t row) const {
    return history_[static_cast<size_t>(row)];
  }

 protected:
  Engine(int64_t batch, int64_t capacity, int64_t vocab_size);

  // Throws: Error unless targets are (B, T), one for each of T tokens of the last append; T is 0 where there was none.
  void check_targets(const at::Tensor& targets, int64_t T) const;

  // The k best of each row, (B, k), k at most V. By default from all logits.
  virtual void do_top(int64_t k, std::vector<Candidate>& best);

  // For a decode() of another kind. Throws: Error unless T more tokens fit.
  void check_room(int64_t T) const;
  // Notes that one token a row, ids (B), was appended without append().
  void note_step(const std::vector<int64_t>& ids);
  const std::vector<std::vector<int64_t>>& histories() const { return history_; }

 private:
  virtual void do_append(const int64_t* ids, int64_t T) = 0;  // checked: (B, T), T >= 1, fits
  virtual void do_rewind(int64_t position) = 0;
  virtual void do_reset(const at::Tensor& first) = 0;  // checked: (B) int64, or undefined
  virtual void do_copy_from(const Engine& other) = 0;

  void append_rows(const int64_t* ids, int64_t T);
  std::span<const Candidate> best(int64_t k, int64_t row);

  int64_t batch_, capacity_, vocab_size_;
  std::vector<std::vector<int64_t>> history_;  // B of them
  std::vector<int64_t> padding_;               // B
  std::vector<Candidate> best_;                // (B, best_k_) of the last position
  int64_t best_k_ = 0;                         // 0: not known
  std::vector<Candidate> candidates_;
  TokenSet seen_;
};

enum class EngineKind { kAuto, kEager, kFused, kTraced, kGraph };

/// Weights of a fused engine: as the model has them, or its bfloat16 layers rounded to int8 as it is made.
enum class OnTheFly { kNone, kInt8 };

/// Options of the fused engine alone.
struct FusedOptions {
  OnTheFly quant = OnTheFly::kNone;
  std::optional<kernels::Isa> isa = {};  // default: the widest of this CPU
  std::optional<c10::ScalarType> products =
      {};                      // of many tokens: float32 or bfloat16; default: the faster
  int threads = 0;             // default: ATen's
  bool pin = false;            // threads stay on their cores
  bool two_stage_head = true;  // top() scans; false: the full head always
  bool profile = false;        // time by kernel
  std::shared_ptr<const Pack> pack =
      {};  // the weights packed before, engines may share them; default: packed by the engine
};

struct EngineOptions {
  EngineKind kind = EngineKind::kAuto;
  int64_t capacity = 4096;  // tokens a row may hold
  int64_t batch = 1;
  int64_t chunk = 512;                           // most tokens of one pass of the model
  std::optional<c10::ScalarType> kv_dtype = {};  // default: the weights' own
  Probe probe = {};                              // eager only
  bool cached = true;                            // false: each append runs the whole sequence anew
  std::string traced_file = {};  // traced only: run this trace; empty: trace the model
  int64_t launch_steps = 8;      // graph only: tokens made between two readings by the host
  FusedOptions fused = {};
};

/// "auto", "eager", "fused", "traced" or "graph". Throws: Error for another name.
EngineKind parse_engine(const std::string& name);

/// The engine that kAuto stands for: fused where it can run the model (on the CPU, bfloat16 or packed weights, no
/// probe), else eager.
EngineKind choose_engine(const Gemma3Model& model, const EngineOptions& options);

/// An engine over `model`, on the model's device. Throws: Error naming what the kind cannot serve.
std::unique_ptr<Engine> make_engine(Gemma3Model model, const EngineOptions& options = {});

}  // namespace gemma_torch
