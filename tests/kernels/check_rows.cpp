// What happens to rows of activations between products.

#include <algorithm>

#include "check.h"

namespace gemma_torch::kernels::test {
namespace {

size_t index(int64_t i) {
  return static_cast<size_t>(i);
}

struct Quantized {
  std::vector<int8_t> high, low;
  std::vector<int16_t> pairs;
  std::vector<int32_t> sums;
  std::vector<float> scales;
};

Quantized quantized(const FusedKernels& kernels, const std::vector<float>& x) {
  const auto n = x.size();
  Quantized q{std::vector<int8_t>(n),
              std::vector<int8_t>(n),
              std::vector<int16_t>(n),
              std::vector<int32_t>(n / 32),
              std::vector<float>(n / 32)};
  kernels.quantize(x.data(),
                   static_cast<int64_t>(n),
                   {q.high.data(), q.low.data(), q.pairs.data(), q.sums.data(), q.scales.data()});
  return q;
}

void compare_quantized(const Subject& s, Check& check, const std::vector<float>& x) {
  constexpr size_t kPlace[4] = {0, 2, 1, 3};
  const auto q = quantized(s.kernels, x);
  const auto plain = quantized(s.generic, x);
  check.same(q.scales, plain.scales);
  std::vector<int32_t> sums(x.size() / 32);
  for (size_t j = 0; j < x.size(); ++j) {
    const int32_t value = 256 * q.high[j] + q.low[j];
    sums[j / 32] += value;
    check.that(std::abs(value) <= 32512);
    check.that(q.pairs[j / 4 * 4 + kPlace[j % 4]] == value);
    check.near(value, 256 * plain.high[j] + plain.low[j], 1);
    // Half a unit, and three roundings of numbers up to 32512 units: factor, product, scale. Groups
    // that are nearly denormal may become zeros.
    const double scale = q.scales[j / 32];
    check.near(value * scale, x[j], 0.506 * scale + (scale < 1e-34 ? 1e-29 : 0.0));
  }
  check.same(q.sums, sums);
}

void check_quantize(const Subject& s) {
  s.report.check(s.name("quantize: within half a unit, all parts agree"), [&](Check& check) {
    Random random(21);
    for (const int64_t n : {32, 64, 640, 1024, 2048}) {
      compare_quantized(s, check, random.normals(n));
      compare_quantized(s, check, random.normals(n, 1e-6F));
      compare_quantized(s, check, random.normals(n, 1e6F));
      auto x = random.normals(n, 0.01F);
      x[index(random.below(n))] = 300;  // an outlier
      compare_quantized(s, check, x);
      compare_quantized(s, check, std::vector<float>(index(n), 0.0F));
      compare_quantized(s, check, std::vector<float>(index(n), -3.0F));
      compare_quantized(s, check, random.normals(n, 1e-41F));  // denormals
      compare_quantized(s, check, random.normals(n, 1e37F));
    }
  });
}

void compare_norm(const Subject& s, Check& check, const std::vector<float>& x, float eps) {
  Random random(22);
  const auto n = static_cast<int64_t>(x.size());
  const auto scale = random.normals(n);
  std::vector<float> y(x.size()), plain(x.size());
  s.kernels.rms_norm(x.data(), scale.data(), y.data(), n, eps);
  s.generic.rms_norm(x.data(), scale.data(), plain.data(), n, eps);
  double squares = 0;
  for (const double value : x) {
    squares += value * value;
  }
  const double factor = 1 / std::sqrt(squares / static_cast<double>(n) + eps);
  for (size_t j = 0; j < x.size(); ++j) {
    const double want = static_cast<double>(x[j]) * factor * scale[j];
    check.near(y[j], want, kSum * std::fabs(want));
    check.near(y[j], plain[j], kSum * std::fabs(want));
  }
}

void check_rms_norm(const Subject& s) {
  s.report.check(s.name("rms_norm"), [&](Check& check) {
    Random random(23);
    for (const int64_t n : {16, 32, 48, 256, 640, 656}) {
      compare_norm(s, check, random.normals(n), 1e-6F);
      compare_norm(s, check, random.normals(n, 1e-5F), 1e-6F);
      compare_norm(s, check, random.normals(n, 1e4F), 1e-6F);
      compare_norm(s, check, std::vector<float>(index(n), 0.0F), 1e-6F);
    }
  });
}

void check_rope(const Subject& s) {
  s.report.check(s.name("rope"), [&](Check& check) {
    Random random(24);
    for (const int64_t n : {32, 64, 96, 256}) {
      const auto x = random.normals(n);
      std::vector<float> cos(index(n / 2)), sin(index(n / 2));
      for (int64_t j = 0; j < n / 2; ++j) {
        const double angle = random.uniform() * 100;
        cos[index(j)] = static_cast<float>(std::cos(angle));
        sin[index(j)] = static_cast<float>(std::sin(angle));
      }
      auto y = x;
      s.kernels.rope(y.data(), cos.data(), sin.data(), n);
      for (int64_t j = 0; j < n / 2; ++j) {
        const double a = x[index(j)], b = x[index(j + n / 2)], c = cos[index(j)], d = sin[index(j)];
        check.near(y[index(j)], a * c - b * d, 2e-7 * (std::fabs(a * c) + std::fabs(b * d)));
        check.near(
            y[index(j + n / 2)], b * c + a * d, 2e-7 * (std::fabs(b * c) + std::fabs(a * d)));
      }
    }
  });
}

double gelu(double x) {
  // 1 + tanh u as 2 / (1 + e^(-2u)): the sum itself cancels for u far below zero.
  return x / (1 + std::exp(-2 * 0.7978845608028654 * (x + 0.044715 * x * x * x)));
}

void check_gelu_mul(const Subject& s) {
  s.report.check(s.name("gelu_mul, gates from -60000 to 60000"), [&](Check& check) {
    Random random(25);
    for (const float scale : {1e-6F, 0.1F, 1.0F, 3.0F, 10.0F, 20000.0F}) {
      const int64_t n = 2048;
      auto gate_up = random.normals(2 * n, scale);
      for (int64_t j = 0; j < n; ++j) {
        gate_up[index(j / 16 * 32 + 16 + j % 16)] = random.normal();
      }
      gate_up[3] = 0;
      gate_up[4] = 60000;
      gate_up[5] = -60000;
      std::vector<float> y(index(n), NAN);
      s.kernels.gelu_mul(gate_up.data(), y.data(), n);
      for (int64_t j = 0; j < n; ++j) {
        const double gate = gate_up[index(j / 16 * 32 + j % 16)],
                     up = gate_up[index(j / 16 * 32 + 16 + j % 16)];
        // The argument u of the exponential, up to 88, is rounded: that much relative error. What
        // is as small as e^-80 may be zero.
        const double want = gelu(gate) * up;
        const double u = std::fmin(std::fabs(gate + 0.044715 * gate * gate * gate), 88.0);
        check.near(y[index(j)],
                   want,
                   (1e-6 + 3e-7 * u) * std::fabs(want) +
                       1e-33 * std::fmax(1, std::fabs(gate)) * std::fabs(up));
      }
    }
  });
}

// 32 rows of 16, to rows that lie apart: what gelu_mul gives for each.
template <typename T>
void compare_gelu_tile(Check& check,
                       const FusedKernels& kernels,
                       void (*gelu_tile)(const float*, T*, int64_t)) {
  Random random(27);
  constexpr int64_t kStride = 24;
  const auto gate_up = random.normals(int64_t{32 * 32});
  std::vector<T> y(32 * kStride, T{});
  gelu_tile(gate_up.data(), y.data(), kStride);
  for (int64_t r = 0; r < 32; ++r) {
    std::vector<float> row(16);
    kernels.gelu_mul(gate_up.data() + 32 * r, row.data(), 16);
    for (int64_t j = 0; j < kStride; ++j) {
      const T got = y[index(r * kStride + j)];
      if (j >= 16) {
        check.same(got, T{});
      } else if constexpr (sizeof(T) == 2) {
        check.same(got, to_bf16(row[index(j)]));
      } else {
        check.same(got, row[index(j)]);
      }
    }
  }
}

void check_gelu_tile(const Subject& s) {
  s.report.check(s.name("gelu_tile, as gelu_mul bit for bit"), [&](Check& check) {
    compare_gelu_tile(check, s.kernels, s.kernels.gelu_tile_bf16);
    compare_gelu_tile(check, s.kernels, s.kernels.gelu_tile_f32);
  });
}

void check_bf16_rows(const Subject& s) {
  s.report.check(s.name("to_bf16 and from_bf16, bit for bit"), [&](Check& check) {
    Random random(26);
    auto x = random.normals(16 * 256);
    for (size_t j = 0; j < x.size(); j += 3) {
      // Exactly between two numbers: to the even one.
      const auto half = static_cast<uint32_t>(0x3f808000U + (random.below(256) << 16));
      std::memcpy(&x[j], &half, 4);
    }
    x[0] = 0;
    x[1] = -0.0F;
    x[2] = INFINITY;
    x[3] = -INFINITY;
    x[4] = 3.4e38F;  // rounds to infinity
    std::vector<Bf16> narrow(x.size());
    std::vector<float> wide(x.size());
    s.kernels.to_bf16(x.data(), narrow.data(), static_cast<int64_t>(x.size()));
    s.kernels.from_bf16(narrow.data(), wide.data(), static_cast<int64_t>(x.size()));
    for (size_t j = 0; j < x.size(); ++j) {
      check.same(narrow[j], to_bf16(x[j]));
      check.same(wide[j], to_float(narrow[j]));
    }
  });
}

}  // namespace

void check_rows(const Subject& s) {
  check_quantize(s);
  check_rms_norm(s);
  check_rope(s);
  check_gelu_mul(s);
  check_gelu_tile(s);
  check_bf16_rows(s);
}

}  // namespace gemma_torch::kernels::test
