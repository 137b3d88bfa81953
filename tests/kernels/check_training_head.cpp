// The gradient of a bfloat16 head by the tokens that matter, against float64.

#include <algorithm>

#include "check.h"
#include "gemma_torch/kernels/cpu/training_kernels.h"

namespace gemma_torch::kernels::test {
namespace {

constexpr float kFactor = 0.125F;
constexpr int64_t kSlack = 16;  // places past the last number that a kernel may write to
constexpr int32_t kGuard = -7;

std::vector<Bf16> normals(Random& random, int64_t n, float scale) {
  std::vector<Bf16> x;
  for (const float one : random.normals(n, scale)) {
    x.push_back(to_bf16(one));
  }
  return x;
}

// A list of its own memory, with a guard behind it.
struct List {
  explicit List(int64_t n)
      : tokens(static_cast<size_t>(n + kSlack + 1), kGuard),
        slopes(static_cast<size_t>(n + kSlack + 1), NAN),
        kept{tokens.data(), slopes.data(), 0} {}
  std::vector<int32_t> tokens;
  std::vector<float> slopes;
  KeptTokens kept;
};

std::vector<double> softmax(const std::vector<Bf16>& x) {
  std::vector<double> p;
  double total = 0;
  for (const auto one : x) {
    p.push_back(std::exp(static_cast<double>(to_float(one))));
    total += p.back();
  }
  for (auto& one : p) {
    one /= total;
  }
  return p;
}

// How few tokens could leave out no more.
int64_t fewest(std::vector<double> p) {
  std::sort(p.begin(), p.end());
  double left_out = 0;
  int64_t count = 0;
  for (; count < static_cast<int64_t>(p.size()); ++count) {
    left_out += p[static_cast<size_t>(count)];
    if (left_out > kLeftOut) {
      break;
    }
  }
  return static_cast<int64_t>(p.size()) - count;
}

void compare_keep(const HeadTraining& head,
                  Check& check,
                  const std::vector<Bf16>& x,
                  int64_t target) {
  const auto n = static_cast<int64_t>(x.size());
  const auto p = softmax(x);
  List list(n);
  const auto loss = head.keep(x.data(), n, target, kFactor, list.kept);
  check.near(loss, -std::log(p[static_cast<size_t>(target)]), 1e-5 * std::max(1.0, loss));
  check.that(list.tokens.back() == kGuard && list.kept.count <= n);
  double left_out = 1;
  int64_t last = -1;
  bool has_target = false;
  for (int64_t i = 0; i < list.kept.count; ++i) {
    const int64_t token = list.kept.tokens[i];
    check.that(token > last && token < n);
    last = token;
    const bool own = token == target;
    has_target = has_target || own;
    const double share = p[static_cast<size_t>(token)];
    left_out -= share;
    check.near(
        list.kept.slopes[i], kFactor * (share - own), kFactor * (1e-4 * share + (own ? 1e-6 : 0)));
  }
  check.that(has_target);
  check.that(left_out <= kLeftOut * (1 + 1e-4));
  check.that(n < 4000 || list.kept.count <= 2 * fewest(p) + 16);
}

void check_keep(const Subject& s, const HeadTraining& head) {
  s.report.check(s.name("tokens that matter to a softmax"), [&](Check& check) {
    Random random(41);
    for (const int64_t n : {1, 2, 15, 16, 17, 33, 640, 4099, s.small ? 9001 : 262144}) {
      for (const float size : {0.01F, 1.0F, 3.0F, 30.0F}) {
        const auto x = normals(random, n, size);
        const auto top = std::max_element(
            x.begin(), x.end(), [](Bf16 a, Bf16 b) { return to_float(a) < to_float(b); });
        for (const auto target : {int64_t{0}, n - 1, random.below(n), int64_t{top - x.begin()}}) {
          compare_keep(head, check, x, target);
        }
      }
    }
  });
  s.report.check(s.name("tokens that matter, of a row whose sample misleads"), [&](Check& check) {
    Random random(44);
    auto x = normals(random, 9001, 1);
    for (int64_t j = 0; j < 9001; ++j) {
      if (j % 256 < 16) {
        x[static_cast<size_t>(j)] = to_bf16(-60);
      }
    }
    compare_keep(head, check, x, 40);
  });
  s.report.check(s.name("no number in, no finite loss of kept tokens"), [&](Check& check) {
    Random random(42);
    auto x = normals(random, 4099, 3);
    List list(4099);
    for (const float bad : {NAN, INFINITY}) {
      x[77] = to_bf16(bad);
      check.that(!std::isfinite(head.keep(x.data(), 4099, 5, kFactor, list.kept)));
    }
  });
}

void compare_product(const HeadTraining& head, Check& check, int64_t n, int64_t columns) {
  Random random(43);
  constexpr int64_t kRows = 5;
  const auto weight = normals(random, n * columns, 1);
  std::vector<List> lists;
  std::vector<KeptTokens> kept;
  std::vector<double> want, size;
  for (int64_t r = 0; r < kRows; ++r) {  // row 0 keeps no token, the last one all
    auto& list = lists.emplace_back(n);
    for (int64_t token = 0; token < n; ++token) {
      if (random.below(kRows - 1) < r) {
        list.kept.tokens[list.kept.count] = static_cast<int32_t>(token);
        list.kept.slopes[list.kept.count++] = random.normal();
      }
    }
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0, sizes = 0;
      for (int64_t i = 0; i < list.kept.count; ++i) {
        const auto at = static_cast<size_t>(list.kept.tokens[i] * columns + j);
        const double term = static_cast<double>(list.kept.slopes[i]) * to_float(weight[at]);
        sum += term;
        sizes += std::fabs(term);
      }
      want.push_back(sum);
      size.push_back(sizes);
    }
  }
  for (const auto& list : lists) {
    kept.push_back(list.kept);
  }
  std::vector<float> room(want.size(), NAN);
  std::vector<Bf16> out(want.size() + 1, to_bf16(-7));
  head.product(kept.data(), kRows, {weight.data(), n, columns, room.data(), out.data()});
  check.that(to_float(out.back()) == -7);
  for (size_t i = 0; i < want.size(); ++i) {
    check.near(to_float(out[i]), want[i], std::fabs(want[i]) / 256 + 10 * kSum * size[i]);
  }
}

}  // namespace

void check_training_head(const Subject& s) {
  const auto& head = training_kernels(s.kernels.isa).head;
  check_keep(s, head);
  s.report.check(s.name("product of kept tokens"), [&](Check& check) {
    for (const int64_t n : {3, 256, 700}) {
      for (const int64_t columns : {1, 31, 32, 33, 64, 72, 640}) {
        compare_product(head, check, n, columns);
      }
    }
  });
}

}  // namespace gemma_torch::kernels::test
