// The kernels of training_kernels.h, written once. Each of training_kernels_{..}.cpp includes this file under its own
// namespace and is compiled for its own instruction set.

#include <algorithm>

#include "gemma_torch/kernels/cpu/lane_math.h"
#include "gemma_torch/kernels/cpu/training_kernels.h"

namespace gemma_torch::kernels::GEMMA_TORCH_ISA {
namespace {

// Less than any number that is worth an exponential, and yet one: see kept_nan().
constexpr float kLowest = -1e30F;

// 0, or NaN where x is no finite number: max and exp would lose those, and a sum is to show them.
GEMMA_TORCH_INLINE F kept_nan(F x) { return x - x; }

// body(j, count) for j = 0, 16, ..: sixteen numbers each time, at last what is left.
template <typename Body>
GEMMA_TORCH_INLINE void by_lanes(int64_t n, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    body(j, int64_t{kLanes});
  }
  if (j < n) {
    body(j, n - j);
  }
}

template <typename T>
T narrow_one(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    T all[kLanes];
    store(all, splat(x));
    return all[0];
  }
}

template <typename T>
GEMMA_TORCH_INLINE F get(const T* p, int64_t count, float fill = 0.0F) {
  if (count == kLanes) {
    return load(p);
  }
  T some[kLanes];
  std::fill(some + count, some + kLanes, narrow_one<T>(fill));
  std::copy(p, p + count, some);
  return load(some);
}

template <typename T>
GEMMA_TORCH_INLINE void put(T* p, F x, int64_t count) {
  if (count == kLanes) {
    store(p, x);
    return;
  }
  T some[kLanes];
  store(some, x);
  std::copy(some, some + count, p);
}

template <typename T>
void rms_norm_backward(const typename RowTraining<T>::Norm& norm, int64_t rows, int64_t columns, float eps) {
  const auto n = static_cast<float>(columns);
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = norm.x + r * columns;
    const T* dy = norm.dy + r * columns;
    T* dx = norm.dx + r * columns;
    F squares{}, products{};
    by_lanes(columns, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      const F xj = get(x + j, count);
      squares = fma(xj, xj, squares);
      products = fma(get(dy + j, count) * (get(norm.scale + j, count) + 1.0F), xj, products);
    });
    const float factor = 1.0F / std::sqrt(sum(squares) / n + eps);
    const float along = sum(products) / n * factor * factor * factor;
    by_lanes(columns, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      const F xj = get(x + j, count);
      const F dyj = get(dy + j, count);
      put(dx + j, dyj * (get(norm.scale + j, count) + 1.0F) * factor - xj * along, count);
      if (norm.dscale != nullptr) {
        put(norm.dscale + j, get(norm.dscale + j, count) + dyj * xj * factor, count);
      }
    });
  }
}

template <typename T>
void gelu_mul_rows(const T* gate, const T* up, T* y, int64_t n) {
  by_lanes(n, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    put(y + j, gelu(get(gate + j, count)) * get(up + j, count), count);
  });
}

template <typename T>
void gelu_mul_backward(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t n) {
  by_lanes(n, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    const F x = get(gate + j, count);
    const F d = get(dy + j, count);
    const F share = gelu_gate(x);  // s: gelu = x s, and s' = s (1 - s) 2 u'
    const F slope = (x * x * (3.0F * 0.044715F) + 1.0F) * (2.0F * 0.797884561F);
    const F gelu_slope = share + x * share * (splat(1.0F) - share) * slope;
    put(dgate + j, d * get(up + j, count) * gelu_slope, count);
    put(dup + j, d * x * share, count);
  });
}

template <typename T>
void clear_unseen(T* x, const typename RowTraining<T>::Seen& seen) {
  std::fill(x, x + seen.begin, T{});
  std::fill(x + seen.end, x + seen.n, T{});
}

template <typename T>
float largest_of(const T* x, int64_t n) {
  F most = splat(kLowest);
  by_lanes(n, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    most = max(get(x + j, count, kLowest), most);
  });
  return largest(most);
}

// The sum of e^(x - top); `see` is given each sixteen of them and their place.
template <typename T, typename See>
GEMMA_TORCH_INLINE double sum_of_exp(const T* x, int64_t n, float top, const See& see) {
  constexpr int64_t kPiece = 4096;  // numbers added in float32: more of them lose too much
  double total = 0;
  for (int64_t start = 0; start < n; start += kPiece) {
    F part{};
    by_lanes(std::min(kPiece, n - start), [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      const F xj = get(x + start + j, count, kLowest);
      const F e = exp(xj - splat(top)) + kept_nan(xj);
      part += e;
      see(start + j, e);
    });
    total += sum(part);
  }
  return total;
}

template <typename T>
void softmax(T* x, const typename RowTraining<T>::Seen& seen, float scale) {
  T* first = x + seen.begin;
  const int64_t n = seen.end - seen.begin;
  const F top = splat(largest_of(first, n));
  F total{};
  by_lanes(n, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    const F xj = get(first + j, count, kLowest);
    total += exp((xj - top) * scale) + kept_nan(xj);
  });
  const float factor = 1.0F / sum(total);
  by_lanes(n, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    put(first + j, exp((get(first + j, count) - top) * scale) * factor, count);
  });
  clear_unseen<T>(x, seen);
}

template <typename T>
void softmax_backward(const T* p, T* dp, const typename RowTraining<T>::Seen& seen, float scale) {
  const T* share = p + seen.begin;
  T* slope = dp + seen.begin;
  const int64_t n = seen.end - seen.begin;
  F products{};
  by_lanes(n, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    products = fma(get(share + j, count), get(slope + j, count), products);
  });
  const F mean = splat(sum(products));
  by_lanes(n, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    put(slope + j, get(share + j, count) * (get(slope + j, count) - mean) * scale, count);
  });
  clear_unseen<T>(dp, seen);
}

template <typename T>
double cross_entropy(T* logits, int64_t n, int64_t target, float factor) {
  const float top = largest_of(logits, n);
  const double total = sum_of_exp(logits, n, top, [](int64_t, const F&) {});
  const double loss = std::log(total) + top - widen(logits[target]);
  // The target's own gradient is rounded once, as one number.
  const double own = std::exp(-loss) - 1.0;
  const auto share = static_cast<float>(factor / total);
  by_lanes(n, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    put(logits + j, exp(get(logits + j, count) - splat(top)) * share, count);
  });
  logits[target] = narrow_one<T>(static_cast<float>(own * factor));
  return loss;
}

#include "gemma_torch/kernels/cpu/training_adamw.inl"
#include "gemma_torch/kernels/cpu/training_head.inl"

template <typename T>
constexpr RowTraining<T> kRows = {.rms_norm_backward = rms_norm_backward<T>,
                                  .gelu_mul = gelu_mul_rows<T>,
                                  .gelu_mul_backward = gelu_mul_backward<T>,
                                  .softmax = softmax<T>,
                                  .softmax_backward = softmax_backward<T>,
                                  .cross_entropy = cross_entropy<T>};

}  // namespace

extern const TrainingKernels kTrainingKernels;
const TrainingKernels kTrainingKernels = {
    GEMMA_TORCH_ISA_VALUE,
    kRows<float>,
    kRows<Bf16>,
    {keep_tokens, kept_product},
    {rounded_adamw<float>, rounded_adamw<Bf16>}};

}  // namespace gemma_torch::kernels::GEMMA_TORCH_ISA
