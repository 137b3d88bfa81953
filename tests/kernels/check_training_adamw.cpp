// AdamW that rounds by chance: against its formula in float64, a neighbour of it each, and right in the mean.

#include <algorithm>

#include "check.h"
#include "gemma_torch/kernels/cpu/training_kernels.h"

namespace gemma_torch::kernels::test {
namespace {

constexpr AdamWFactors kBy = {.gradient = 0.5F,
                              .beta1 = 0.9F,
                              .beta2 = 0.99F,
                              .keep = 0.998F,
                              .rate = 0.02F,
                              .root = 3.0F,
                              .eps = 0.05F,
                              .seed = 12345};

template <typename G>
struct Tensors {
  std::vector<Bf16> parameter, exp_avg, exp_avg_sq;
  std::vector<G> gradient;
  RoundedAdamW<G> from(int64_t place) {
    return {parameter.data() + place,
            exp_avg.data() + place,
            exp_avg_sq.data() + place,
            gradient.data() + place};
  }
};

template <typename G>
Tensors<G> drawn(int64_t n) {
  Random random(static_cast<uint64_t>(n));
  Tensors<G> all;
  for (int64_t i = 0; i < n; ++i) {
    all.parameter.push_back(to_bf16(random.normal()));
    all.exp_avg.push_back(to_bf16(0.1F * random.normal()));
    all.exp_avg_sq.push_back(to_bf16(0.01F * std::fabs(random.normal())));
    all.gradient.push_back(narrow<G>(0.1F * random.normal()));
  }
  return all;
}

struct Want {
  double parameter, exp_avg, exp_avg_sq;
};

template <typename G>
Want stepped(const Tensors<G>& of, size_t i) {
  const double slope = value(of.gradient[i]) * static_cast<double>(kBy.gradient);
  const double beta1 = static_cast<double>(kBy.beta1), beta2 = static_cast<double>(kBy.beta2);
  const double mean = value(of.exp_avg[i]) * beta1 + slope * (1 - beta1);
  const double square = value(of.exp_avg_sq[i]) * beta2 + slope * slope * (1 - beta2);
  const double step =
      mean * static_cast<double>(kBy.rate) /
      (std::sqrt(square) * static_cast<double>(kBy.root) + static_cast<double>(kBy.eps));
  return {value(of.parameter[i]) * static_cast<double>(kBy.keep) - step, mean, square};
}

template <typename G>
void run(const Subject& s, Tensors<G>& of, int64_t first, int64_t n, const AdamWFactors& by) {
  const auto& adamw = training_kernels(s.kernels.isa).adamw;
  if constexpr (sizeof(G) == sizeof(float)) {
    adamw.f32(of.from(first), first, n, by);
  } else {
    adamw.bf16(of.from(first), first, n, by);
  }
}

// Less than a step of bfloat16 from the number itself: one of its two neighbours.
void near(Check& check, Bf16 got, double want) {
  check.near(to_float(got), want, std::ldexp(1.0 + 1e-4, std::ilogb(want) - 7) + 1e-7);
}

template <typename G>
void check_neighbours(const Subject& s, const char* type) {
  s.report.check(s.name("adamw, rounded to a neighbour") + type, [&](Check& check) {
    for (const int64_t n : {1, 15, 16, 17, 100, 4099}) {
      const auto before = drawn<G>(n);
      auto after = before, parts = before;
      run(s, after, 0, n, kBy);
      for (size_t i = 0; i < after.parameter.size(); ++i) {
        const auto want = stepped(before, i);
        near(check, after.parameter[i], want.parameter);
        near(check, after.exp_avg[i], want.exp_avg);
        near(check, after.exp_avg_sq[i], want.exp_avg_sq);
      }
      run(s, parts, 0, n / 3, kBy);  // the same in two parts, as threads share it out
      run(s, parts, n / 3, n - n / 3, kBy);
      check.same(parts.parameter, after.parameter);
      check.same(parts.exp_avg, after.exp_avg);
      check.same(parts.exp_avg_sq, after.exp_avg_sq);
    }
  });
}

// Where nothing but the rounding happens, what carries is the hash of the number's place, on every instruction set.
void check_chance(const Subject& s) {
  s.report.check(s.name("adamw, the chance is a hash of the place"), [&](Check& check) {
    auto by = kBy;
    by.keep = by.beta1 = 1.0F + 0x1p-10F;  // times a bfloat16, exact in float32
    by.rate = 0;
    constexpr int64_t kFirst = 1000, kCount = 777;
    auto of = drawn<Bf16>(kFirst + kCount);
    std::fill(of.gradient.begin(), of.gradient.end(), Bf16{});
    const auto before = of;
    run(s, of, kFirst, kCount, by);
    const auto rounded = [&](Bf16 x, uint32_t chance) {
      const float exact = to_float(x) * by.keep;
      uint32_t bits = 0;
      std::memcpy(&bits, &exact, sizeof bits);
      return Bf16{static_cast<uint16_t>((bits + chance) >> 16)};
    };
    for (int64_t i = 0; i < kFirst + kCount; ++i) {
      const auto at = static_cast<size_t>(i);
      if (i < kFirst) {
        check.same(of.parameter[at], before.parameter[at]);
        continue;
      }
      uint32_t x = by.seed + static_cast<uint32_t>(i);
      x = (x ^ (x >> 16)) * 0x7feb352dU;
      x = (x ^ (x >> 15)) * 0x846ca68bU;
      x ^= x >> 16;
      check.same(of.parameter[at], rounded(before.parameter[at], x >> 16));
      check.same(of.exp_avg[at], rounded(before.exp_avg[at], x & 0xffffU));
    }
  });
}

// One number, many times: the mean of what it is rounded to is the number itself.
void check_mean(const Subject& s) {
  s.report.check(s.name("adamw, right in the mean"), [&](Check& check) {
    const int64_t n = s.small ? 4096 : 65536;
    const auto all = static_cast<size_t>(n);
    for (const uint32_t seed : {0U, 1U, 77777U, 0xffffff00U}) {
      auto by = kBy;
      by.seed = seed;
      const auto one = drawn<Bf16>(1);
      Tensors<Bf16> of = {std::vector(all, one.parameter[0]),
                          std::vector(all, one.exp_avg[0]),
                          std::vector(all, one.exp_avg_sq[0]),
                          std::vector(all, one.gradient[0])};
      run(s, of, 0, n, by);
      const auto want = stepped(one, 0);
      const auto mean_is = [&](const std::vector<Bf16>& x, double wanted) {
        double sum = 0;
        for (const auto number : x) {
          sum += to_float(number);
        }
        // Five standard errors of a number that is one of two, a step apart.
        const double step = std::ldexp(1.0, std::ilogb(wanted) - 7);
        check.near(
            sum / static_cast<double>(n), wanted, 2.5 * step / std::sqrt(static_cast<double>(n)));
      };
      mean_is(of.parameter, want.parameter);
      mean_is(of.exp_avg, want.exp_avg);
      mean_is(of.exp_avg_sq, want.exp_avg_sq);
      check.that(std::adjacent_find(of.parameter.begin(), of.parameter.end(), [](Bf16 a, Bf16 b) {
                   return a.bits != b.bits;
                 }) != of.parameter.end());
    }
  });
}

}  // namespace

void check_training_adamw(const Subject& s) {
  check_neighbours<float>(s, " of float32");
  check_neighbours<Bf16>(s, " of bfloat16");
  check_chance(s);
  check_mean(s);
}

}  // namespace gemma_torch::kernels::test
