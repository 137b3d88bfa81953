// What training does to rows of activations: gradients against their formulas in float64, for both types of numbers.

#include <algorithm>

#include "check.h"
#include "gemma_torch/kernels/cpu/training_kernels.h"

namespace gemma_torch::kernels::test {
namespace {

using Numbers = std::vector<double>;

// Lengths around those of a vector, of a few, and past the numbers that are summed together.
const std::vector<int64_t> kLengths = {1, 2, 15, 16, 17, 31, 33, 100, 640, 4099};
constexpr double kTiny = 1e-36;  // near the smallest normal number: what is less may be zero

size_t index(int64_t i) {
  return static_cast<size_t>(i);
}

template <typename T>
const RowTraining<T>& rows_of(const Subject& s) {
  const auto& kernels = training_kernels(s.kernels.isa);
  if constexpr (sizeof(T) == sizeof(float)) {
    return kernels.f32;
  } else {
    return kernels.bf16;
  }
}

// A result is rounded to its type: bfloat16 keeps 8 bits.
template <typename T>
constexpr double kRounding = sizeof(T) == sizeof(float) ? 0 : 1.0 / 256;

template <typename T>
std::vector<T> normals(Random& random, int64_t n, float scale = 1) {
  std::vector<T> x;
  for (const float one : random.normals(n, scale)) {
    x.push_back(narrow<T>(one));
  }
  return x;
}

// Sixteen numbers past the end, which no kernel may touch.
template <typename T>
std::vector<T> guarded(std::vector<T> x) {
  x.insert(x.end(), 16, narrow<T>(7));
  return x;
}
template <typename T>
void check_guard(Check& check, const std::vector<T>& x) {
  for (auto j = x.size() - 16; j < x.size(); ++j) {
    check.same(x[j], narrow<T>(7));
  }
}

template <typename T>
const char* type_name() {
  return sizeof(T) == sizeof(float) ? " float32" : " bfloat16";
}

template <typename T>
void near(Check& check, T got, double want, double tolerance) {
  check.near(value(got), want, tolerance + kRounding<T> * std::fabs(want) + kTiny);
}

// ---- RMSNorm

template <typename T>
void compare_norm_backward(const Subject& s, Check& check, int64_t rows, int64_t n, float size) {
  constexpr float kEps = 1e-6F;
  Random random(static_cast<uint64_t>(31 + n));
  const auto x = normals<T>(random, rows * n, size), dy = normals<T>(random, rows * n);
  const auto scale = normals<T>(random, n);
  const auto before = random.normals(n);
  auto dscale = guarded(before);
  auto dx = guarded(x), again = dx;
  const auto run = rows_of<T>(s).rms_norm_backward;
  run({x.data(), scale.data(), dy.data(), dx.data(), dscale.data()}, rows, n, kEps);
  run({x.data(), scale.data(), dy.data(), again.data(), nullptr}, rows, n, kEps);
  check.same(dx, again);
  check_guard(check, dx);
  check_guard(check, dscale);
  Numbers want_scale(before.begin(), before.end()), size_scale(index(n), 1.0);
  for (int64_t r = 0; r < rows; ++r) {
    double squares = 0, products = 0, sizes = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double xj = value(x[index(r * n + j)]);
      const double g = value(dy[index(r * n + j)]) * (1 + value(scale[index(j)]));
      squares += xj * xj;
      products += g * xj;
      sizes += std::fabs(g * xj);
    }
    const auto count = static_cast<double>(n);
    const double factor = 1 / std::sqrt(squares / count + static_cast<double>(kEps));
    const double cube = factor * factor * factor / count;
    for (int64_t j = 0; j < n; ++j) {
      const double xj = value(x[index(r * n + j)]), dyj = value(dy[index(r * n + j)]);
      const double g = dyj * (1 + value(scale[index(j)]));
      const double terms = std::fabs(g * factor) + std::fabs(xj) * cube * sizes;
      near(check, dx[index(r * n + j)], g * factor - xj * cube * products, kSum * terms);
      want_scale[index(j)] += dyj * xj * factor;
      size_scale[index(j)] += std::fabs(dyj * xj * factor);
    }
  }
  for (int64_t j = 0; j < n; ++j) {
    check.near(dscale[index(j)], want_scale[index(j)], kSum * size_scale[index(j)]);
  }
}

template <typename T>
void check_norm_backward(const Subject& s) {
  s.report.check(s.name("rms_norm_backward") + type_name<T>(), [&](Check& check) {
    for (const auto n : kLengths) {
      for (const float size : {1e-4F, 1.0F, 300.0F}) {
        compare_norm_backward<T>(s, check, /*rows=*/3, n, size);
      }
    }
  });
}

// ---- gelu

// gelu with tanh is x s, s = 1 / (1 + e^(-2u)).
struct Gelu {
  double u, share, slope;  // slope: of 2u
  explicit Gelu(double x)
      : u(0.7978845608028654 * (x + 0.044715 * x * x * x)),
        share(1 / (1 + std::exp(-2 * u))),
        slope(2 * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)) {}
  // The exponential's argument, up to 88, is rounded: that much relative error.
  double relative() const { return 1e-6 + 3e-7 * std::fmin(std::fabs(2 * u), 88.0); }
};

template <typename T>
void compare_gelu(const Subject& s, Check& check, int64_t n, float size) {
  Random random(static_cast<uint64_t>(32 + n));
  auto gate = normals<T>(random, n, size);
  const auto up = normals<T>(random, n), dy = normals<T>(random, n);
  gate[0] = narrow<T>(60000);
  gate[index(n / 2)] = narrow<T>(-60000);
  gate[index(n - 1)] = narrow<T>(0);
  auto y = guarded(up), dgate = y, dup = y;
  rows_of<T>(s).gelu_mul(gate.data(), up.data(), y.data(), n);
  rows_of<T>(s).gelu_mul_backward(gate.data(), up.data(), dy.data(), dgate.data(), dup.data(), n);
  for (const auto* out : {&y, &dgate, &dup}) {
    check_guard(check, *out);
  }
  for (size_t j = 0; j < gate.size(); ++j) {
    const double x = value(gate[j]), u = value(up[j]), d = value(dy[j]);
    const Gelu gelu(x);
    const double floor = 1e-20;  // e^-88 times what the gates of 60000 make of it
    const double y_want = x * gelu.share * u;
    near(check, y[j], y_want, gelu.relative() * std::fabs(y_want) + floor * std::fabs(u));
    const double dup_want = d * x * gelu.share;
    near(check, dup[j], dup_want, gelu.relative() * std::fabs(dup_want) + floor * std::fabs(d));
    const double bend = x * gelu.share * (1 - gelu.share) * gelu.slope;
    // 1 - s is off by half a unit of 1.
    const double lost = 2e-7 * std::fabs(x) * gelu.share * gelu.slope;
    const double terms = gelu.relative() * (gelu.share + std::fabs(bend)) + lost + floor;
    near(check, dgate[j], d * u * (gelu.share + bend), std::fabs(d * u) * terms);
  }
}

template <typename T>
void check_gelu(const Subject& s) {
  s.report.check(s.name("gelu_mul of rows, and its gradients") + type_name<T>(), [&](Check& check) {
    for (const auto n : kLengths) {
      for (const float size : {1e-3F, 1.0F, 5.0F, 1000.0F}) {
        compare_gelu<T>(s, check, n, size);
      }
    }
  });
}

// ---- softmax

struct Softmax {
  Numbers p, away;  // away: how far scale * x is below the largest, which costs accuracy
  double loss_of_top = 0;

  template <typename T>
  Softmax(const std::vector<T>& x, int64_t begin, int64_t end, double scale)
      : p(x.size(), 0.0), away(x.size(), 0.0) {
    double top = -INFINITY, total = 0;
    for (auto j = begin; j < end; ++j) {
      top = std::fmax(top, scale * value(x[index(j)]));
    }
    for (auto j = begin; j < end; ++j) {
      away[index(j)] = top - scale * value(x[index(j)]);
      p[index(j)] = std::exp(-away[index(j)]);
      total += p[index(j)];
    }
    for (auto& one : p) {
      one /= total;
    }
    loss_of_top = std::log(total);
  }
  double relative(size_t j) const { return 1e-6 + 3e-7 * std::fmin(away[j], 88.0); }
};

template <typename T>
void compare_softmax(const Subject& s, Check& check, int64_t n, float size) {
  constexpr float kScale = 0.25F;
  Random random(static_cast<uint64_t>(33 + n));
  const auto begin = n / 3, end = n - n / 5;
  const typename RowTraining<T>::Seen seen{n, begin, end};
  auto x = normals<T>(random, n, size);
  x[0] = narrow<T>(1e30);  // not seen unless it is the only one
  const Softmax want(x, begin, end, kScale);
  auto p = guarded(x);
  rows_of<T>(s).softmax(p.data(), seen, kScale);
  auto slope = guarded(normals<T>(random, n));
  const auto dp = slope;
  rows_of<T>(s).softmax_backward(p.data(), slope.data(), seen, kScale);
  check_guard(check, p);
  check_guard(check, slope);
  double mean = 0, sizes = 0;
  for (auto j = begin; j < end; ++j) {
    mean += value(p[index(j)]) * value(dp[index(j)]);
    sizes += std::fabs(value(p[index(j)]) * value(dp[index(j)]));
  }
  for (int64_t j = 0; j < n; ++j) {
    if (j < begin || j >= end) {
      check.same(p[index(j)], T{});
      check.same(slope[index(j)], T{});
      continue;
    }
    near(check, p[index(j)], want.p[index(j)], want.relative(index(j)) * want.p[index(j)]);
    const double share = kScale * value(p[index(j)]), d = value(dp[index(j)]);
    near(check, slope[index(j)], share * (d - mean), kSum * share * (std::fabs(d) + sizes));
  }
}

template <typename T>
void check_softmax(const Subject& s) {
  s.report.check(s.name("softmax of what is seen, and its gradient") + type_name<T>(),
                 [&](Check& check) {
                   for (const auto n : kLengths) {
                     for (const float size : {0.1F, 4.0F, 100.0F}) {
                       compare_softmax<T>(s, check, n, size);
                     }
                   }
                 });
}

template <typename T>
void compare_cross_entropy(const Subject& s, Check& check, std::vector<T> x, int64_t target) {
  constexpr float kFactor = 0.125F;
  const auto n = static_cast<int64_t>(x.size());
  const Softmax want(x, 0, n, 1);
  x = guarded(x);
  const auto loss = rows_of<T>(s).cross_entropy(x.data(), n, target, kFactor);
  const double far = want.away[index(target)];
  check.near(loss, want.loss_of_top + far, 2e-6);
  check_guard(check, x);
  for (size_t j = 0; j < want.p.size(); ++j) {
    const bool own = static_cast<int64_t>(j) == target;
    const double wanted = kFactor * (want.p[j] - (own ? 1 : 0));
    near(check, x[j], wanted, kFactor * (want.relative(j) * want.p[j] + (own ? 1e-6 : 0)));
  }
}

template <typename T>
void check_cross_entropy(const Subject& s) {
  s.report.check(s.name("cross_entropy and its gradient") + type_name<T>(), [&](Check& check) {
    Random random(34);
    auto lengths = kLengths;
    lengths.push_back(s.small ? 9001 : 262144);
    for (const auto n : lengths) {
      for (const float size : {0.1F, 3.0F, 30.0F}) {
        const auto x = normals<T>(random, n, size);
        for (const auto target : {int64_t{0}, n - 1, random.below(n)}) {
          compare_cross_entropy(s, check, x, target);
        }
      }
    }
  });
}

// What is no number has to show, wherever it stands: a maximum would pass over it.
template <typename T>
void check_no_number(const Subject& s) {
  s.report.check(s.name("no number in, no number out") + type_name<T>(), [&](Check& check) {
    Random random(35);
    for (const double bad : {NAN, INFINITY, -INFINITY}) {
      for (const int64_t place : {0, 5, 16, 36}) {
        auto x = normals<T>(random, 37);
        x[index(place)] = narrow<T>(bad);
        auto p = x;
        rows_of<T>(s).softmax(p.data(), {37, 0, 37}, 1);
        check.that(std::all_of(p.begin(), p.end(), [](T one) { return std::isnan(value(one)); }));
        check.that(!std::isfinite(rows_of<T>(s).cross_entropy(x.data(), 37, 1, 1)));
      }
    }
  });
}

template <typename T>
void check_type(const Subject& s) {
  check_norm_backward<T>(s);
  check_gelu<T>(s);
  check_softmax<T>(s);
  check_cross_entropy<T>(s);
  check_no_number<T>(s);
}

}  // namespace

void check_training(const Subject& s) {
  s.report.check(s.name("has its own training kernels"), [&](Check& check) {
    const auto wanted = s.kernels.isa == Isa::kAmx ? Isa::kAvx512 : s.kernels.isa;
    check.that(training_kernels(s.kernels.isa).isa == wanted);
  });
  check_type<float>(s);
  check_type<Bf16>(s);
}

}  // namespace gemma_torch::kernels::test
