// Weights as panels, and products of 32 rows and 32 columns.

#include "matrices.h"

namespace gemma_torch::kernels::test {
namespace {

size_t index(int64_t i) {
  return static_cast<size_t>(i);
}

Bf16 from_panel(const std::vector<Bf16>& panel, int64_t row, int64_t column) {
  return panel[index(column / 2 * 32 + row * 2 + column % 2)];
}
float from_panel(const std::vector<float>& panel, int64_t row, int64_t column) {
  return panel[index(column * 16 + row)];
}

// Every number of a matrix through its panels; want(row, column) in the panel's type.
template <typename T, typename Want>
void compare_panels(Check& check,
                    const Packed& w,
                    void (*panel_of)(const Packed&, int64_t, T*),
                    const Want& want) {
  for (int64_t b = 0; b < w.blocks(); ++b) {
    std::vector<T> panel(index(w.columns * kBlockRows));
    panel_of(w, b, panel.data());
    for (int64_t r = 0; r < kBlockRows; ++r) {
      for (int64_t j = 0; j < w.columns; ++j) {
        check.same(from_panel(panel, r, j), want(b * kBlockRows + r, j));
      }
    }
  }
}

// Bits of every kind, among them infinities, NaN and whole cells of zeros.
std::vector<Bf16> any_bits(Random& random, int64_t count) {
  std::vector<Bf16> w(index(count));
  for (auto& value : w) {
    value = {static_cast<uint16_t>(random.bits())};
  }
  for (int64_t i = 0; i < count / 2; ++i) {
    w[index(i)] = {static_cast<uint16_t>(random.below(2) << 15)};
  }
  return w;
}

void check_lossless_panels(const Subject& s) {
  s.report.check(
      s.name("lossless12 through panel_bf16 and panel_f32, bit for bit"), [&](Check& check) {
        Random random(11);
        for (const Shape& shape :
             {Shape{16, 64, 64}, Shape{48, 192, 64}, Shape{48, 640, 640}, Shape{32, 128, 128}}) {
          for (const bool any : {false, true}) {
            const int64_t count = shape.rows * shape.columns;
            const LosslessMatrix matrix(
                any ? any_bits(random, count) : awkward_weights(random, count, 512), shape);
            const auto at = [&](int64_t r, int64_t j) {
              return matrix.w[index(r * shape.columns + j)];
            };
            compare_panels(check, matrix.packed, s.kernels.panel_bf16, at);
            compare_panels(check, matrix.packed, s.kernels.panel_f32, [&](int64_t r, int64_t j) {
              return to_float(at(r, j));
            });
          }
        }
      });
}

void check_code_panels(const Subject& s, Format format) {
  s.report.check(
      s.name(std::string(format_name(format)) + " through panel_bf16 and panel_f32, bit for bit"),
      [&](Check& check) {
        Random random(12);
        for (const Shape& shape : {Shape{16, 64, 64}, Shape{48, 192, 64}, Shape{32, 640, 640}}) {
          const int64_t count = shape.rows * shape.columns;
          const CodeMatrix matrix(format,
                                  random_codes(random, format, count),
                                  random_scales(random, count / group_columns(format)),
                                  shape);
          // A code of 8 bits times a scale of 8 is exact in float32. 0.0F: no zero is negative.
          const auto exact = [&](int64_t r, int64_t j) {
            return static_cast<float>(matrix.code(r, j)) * matrix.scale(r, j);
          };
          compare_panels(check, matrix.packed, s.kernels.panel_f32, exact);
          compare_panels(check, matrix.packed, s.kernels.panel_bf16, [&](int64_t r, int64_t j) {
            return to_bf16(exact(r, j));
          });
        }
      });
}

float number(float x) {
  return x;
}
float number(Bf16 x) {
  return to_float(x);
}

// One product of 32 rows and two panels; rows of a and c have room between them that stays as it
// was.
template <typename T, typename Kernel>
void compare_gemm(
    Check& check, const Gemm& how, const Kernel& gemm, const Kernel& generic, int64_t k, bool add) {
  Random random(static_cast<uint64_t>(k) + (add ? 1000 : 0));
  const int64_t a_stride = k + 32, c_stride = 48;
  const auto draw = [&](int64_t n) {
    std::vector<T> numbers(index(n));
    for (auto& x : numbers) {
      if constexpr (sizeof(T) == 2) {
        x = to_bf16(random.normal());
      } else {
        x = random.normal();
      }
    }
    return numbers;
  };
  const auto a = draw(32 * a_stride);
  const std::vector<T> b[2] = {draw(16 * k), draw(16 * k)};
  const T* const panels[2] = {b[0].data(), b[1].data()};
  const auto before = random.normals(32 * c_stride);
  auto c = before, plain = before;
  how.begin();
  gemm(a.data(), a_stride, panels, k, c.data(), c_stride, add);
  how.end();
  generic(a.data(), a_stride, panels, k, plain.data(), c_stride, add);
  for (int64_t i = 0; i < 32 * c_stride; ++i) {
    const int64_t r = i / c_stride, column = i % c_stride;
    if (column >= 32) {
      check.same(c[index(i)], before[index(i)]);
      continue;
    }
    double want = add ? before[index(i)] : 0.0, size = std::fabs(want);
    for (int64_t j = 0; j < k; ++j) {
      const double product = static_cast<double>(number(a[index(r * a_stride + j)])) *
                             number(from_panel(b[column / 16], column % 16, j));
      want += product;
      size += std::fabs(product);
    }
    check.near(c[index(i)], want, kSum * size);
    check.near(c[index(i)], plain[index(i)], kSum * size);
  }
}

}  // namespace

void check_panels(const Subject& s) {
  check_lossless_panels(s);
  for (const auto format : kCodeFormats) {
    check_code_panels(s, format);
  }
}

void check_gemm(const Subject& s) {
  for (const bool add : {false, true}) {
    const std::string how = add ? ", added to what is there" : "";
    s.report.check(s.name("gemm bf16" + how), [&](Check& check) {
      for (const int64_t k : {32, 64, 96, 640, 2048}) {
        compare_gemm<Bf16>(check, s.kernels.gemm, s.kernels.gemm.bf16, s.generic.gemm.bf16, k, add);
      }
    });
    s.report.check(s.name("gemm f32" + how), [&](Check& check) {
      for (const int64_t k : {32, 64, 96, 640, 2048}) {
        compare_gemm<float>(check, s.kernels.gemm, s.kernels.gemm.f32, s.generic.gemm.f32, k, add);
      }
    });
  }
}

}  // namespace gemma_torch::kernels::test
