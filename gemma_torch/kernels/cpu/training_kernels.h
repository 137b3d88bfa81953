#pragma once

#include <cstdint>

#include "gemma_torch/kernels/cpu/isa.h"
#include "gemma_torch/kernels/cpu/packed.h"

namespace gemma_torch::kernels {

/// What training does to rows of activations beside products, for numbers of one type. Sums are in float32 or wider.
/// Rows may have any length. None allocates, none starts threads: callers share rows out among theirs.
template <typename T>
struct RowTraining {
  /// Gradients of y[j] = x[j] / rms(x) * (1 + scale[j]) over `rows` rows: writes dx, adds to dscale (columns) where it
  /// is not null.
  struct Norm {
    const T* x;
    const T* scale;
    const T* dy;
    T* dx;
    float* dscale;
  };
  void (*rms_norm_backward)(const Norm& norm, int64_t rows, int64_t columns, float eps);

  /// y[j] = gelu(gate[j]) up[j], gelu with tanh; and its gradients.
  void (*gelu_mul)(const T* gate, const T* up, T* y, int64_t n);
  void (*gelu_mul_backward)(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t n);

  /// Softmax of scale * x over x[begin] .. x[end - 1], in place; the rest of the n numbers becomes 0.
  struct Seen {
    int64_t n, begin, end;
  };
  void (*softmax)(T* x, const Seen& seen, float scale);
  /// dp becomes the gradient of x, given what softmax made of it.
  void (*softmax_backward)(const T* p, T* dp, const Seen& seen, float scale);

  /// Returns -ln softmax(logits)[target], in nats; logits become `factor` times its gradient.
  double (*cross_entropy)(T* logits, int64_t n, int64_t target, float factor);
};

/// The tokens that matter to one row's softmax, by rising number, and the gradient of the loss at each.
struct KeptTokens {
  int32_t* tokens;
  float* slopes;
  int64_t count;
};

/// Most of a softmax over a large vocabulary is nearly nothing. Tokens that have together at most this much of the
/// probability are left out of a row's gradient: a quarter of what rounding the gradient to bfloat16 takes from it.
constexpr float kLeftOut = 0x1p-10F;

/// The gradient of a bfloat16 head, by its kept tokens: a fraction of the work of the full product.
struct HeadTraining {
  /// Returns -ln softmax(logits)[target], in nats, of n logits; fills `kept`, which has room for n + 16
  /// tokens, with `factor` times its gradient.
  double (*keep)(const Bf16* logits, int64_t n, int64_t target, float factor, KeptTokens& kept);

  /// out (rows, columns) = for each row the sum of slopes[i] * weight[tokens[i]], summed in float32 in `room` (rows,
  /// columns) and rounded once. n: rows of the weight. Uses `kept` up.
  struct Product {
    const Bf16* weight;
    int64_t n, columns;
    float* room;
    Bf16* out;
  };
  void (*product)(KeptTokens* kept, int64_t rows, const Product& of);
};

/// One AdamW step of numbers that are kept in bfloat16 alone, as are their moments. All is computed
/// in float32 and rounded by chance, up or down so that the mean is the float32 number: rounded to
/// the nearest, a weight would not move by less than 2^-9 of itself, nor a second moment decay by a
/// thousandth.
template <typename G>
struct RoundedAdamW {
  Bf16* parameter;
  Bf16* exp_avg;
  Bf16* exp_avg_sq;
  const G* gradient;
};
struct AdamWFactors {
  float gradient;      // what gradients are multiplied by
  float beta1, beta2;  // share of the old moments
  float keep;          // 1 - learning rate * weight decay
  float rate;          // learning rate / (1 - beta1^step)
  float root;          // 1 / sqrt(1 - beta2^step)
  float eps;
  uint32_t seed;  // of the chance: number i of a tensor draws from hash(seed + i)
};
struct OptimizerTraining {
  /// Of the n numbers from number `first` of a tensor on.
  void (*f32)(const RoundedAdamW<float>& of, int64_t first, int64_t n, const AdamWFactors& factors);
  void (*bf16)(const RoundedAdamW<Bf16>& of, int64_t first, int64_t n, const AdamWFactors& factors);
};

struct TrainingKernels {
  Isa isa;
  RowTraining<float> f32;
  RowTraining<Bf16> bf16;
  HeadTraining head;
  OptimizerTraining adamw;  // by the type of gradients
};

/// Those of one instruction set, or of the next narrower one that there are any for. The caller sees to it that
/// has_isa(isa).
const TrainingKernels& training_kernels(Isa isa);

}  // namespace gemma_torch::kernels
