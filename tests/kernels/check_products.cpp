// Products of packed weights with one to eight rows.

#include "matrices.h"

namespace gemma_torch::kernels::test {
namespace {

struct Part {
  Range slices, blocks;
};

// All of a matrix, and where there is enough of it, its inside.
std::vector<Part> parts(const Packed& w) {
  std::vector<Part> all{{{0, w.slices()}, {0, w.blocks()}}};
  if (w.blocks() > 2) {
    all.push_back({{0, w.slices()}, {1, w.blocks() - 1}});
  }
  if (w.slices() > 2) {
    all.push_back({{1, w.slices() - 1}, {0, w.blocks()}});
    all.push_back({{1, 2}, {w.blocks() - 1, w.blocks()}});
  }
  return all;
}

std::vector<Shape> shapes(bool small) {
  std::vector<Shape> all;
  for (const auto& [rows, columns] :
       {std::pair<int64_t, int64_t>{16, 64}, {48, 192}, {80, 640}, {32, 2048}}) {
    if (small && columns > 640) {
      continue;
    }
    all.push_back({rows, columns, columns});
    all.push_back({rows, columns, kSliceColumns});
  }
  return all;
}

// y, with room between the rows and what was there before, after product(x); compared with a sum in
// float64.
template <typename Matrix, typename X>
void check_product(
    const Subject& s, Check& check, const Matrix& matrix, const Rows& x, const X& value) {
  const Packed& w = matrix.packed;
  const int64_t stride = w.rows + 16;
  Random random(5);
  const auto before = random.normals(x.count * stride);
  for (const auto& [slices, blocks] : parts(w)) {
    auto y = before, plain = before;
    s.kernels.product(w, slices, blocks, x, y.data(), stride);
    s.generic.product(w, slices, blocks, x, plain.data(), stride);
    for (int64_t i = 0; i < x.count * stride; ++i) {
      const int64_t m = i / stride, r = i % stride;
      const auto at = static_cast<size_t>(i);
      if (r < blocks.begin * kBlockRows || r >= blocks.end * kBlockRows) {
        check.same(y[at], before[at]);
        continue;
      }
      double want = before[at], size = std::fabs(want);
      for (int64_t j = slices.begin * w.slice; j < slices.end * w.slice; ++j) {
        const double product = matrix.at(r, j) * value(m, j);
        want += product;
        size += std::fabs(product);
      }
      check.near(y[at], want, kSum * size);
      check.near(y[at], plain[at], kSum * size);
    }
  }
}

void check_lossless(const Subject& s, int64_t count) {
  s.report.check(
      s.name("product lossless12, " + std::to_string(count) + " rows"), [&](Check& check) {
        Random random(1);
        for (const auto& shape : shapes(s.small)) {
          const LosslessMatrix matrix(awkward_weights(random, shape.rows * shape.columns, 4),
                                      shape);
          const int64_t stride = shape.columns + 8;
          const auto x = random.normals(count * stride);
          check_product(
              s, check, matrix, {count, x.data(), stride, nullptr}, [&](int64_t m, int64_t j) {
                return static_cast<double>(x[static_cast<size_t>(m * stride + j)]);
              });
        }
      });
}

// With a one among zeros, a product is the weight itself.
void check_lossless_exact(const Subject& s) {
  s.report.check(
      s.name("product lossless12 with unit vectors gives every weight"), [&](Check& check) {
        Random random(2);
        for (const auto slice : {int64_t{64}, int64_t{128}}) {
          const Shape shape{32, 128, slice};
          const LosslessMatrix matrix(awkward_weights(random, shape.rows * shape.columns, 512),
                                      shape);
          check.that(matrix.packed.exception_count > 10);
          std::vector<float> x(static_cast<size_t>(shape.columns));
          for (int64_t j = 0; j < shape.columns; ++j) {
            x.assign(x.size(), 0.0F);
            x[static_cast<size_t>(j)] = 1;
            std::vector<float> y(static_cast<size_t>(shape.rows));
            const Packed& w = matrix.packed;
            s.kernels.product(
                w, {0, w.slices()}, {0, w.blocks()}, {1, x.data(), 0, nullptr}, y.data(), 0);
            for (int64_t r = 0; r < shape.rows; ++r) {
              check.that(y[static_cast<size_t>(r)] == static_cast<float>(matrix.at(r, j)));
            }
          }
        }
      });
}

void fill(QuantizedRows& x, Random& random, int64_t columns) {
  for (int64_t m = 0; m < x.count(); ++m) {
    for (int64_t j = 0; j < columns; ++j) {
      x.set(m, j, static_cast<int32_t>(random.below(2 * 32512 + 1) - 32512));
    }
    for (int64_t g = 0; g < columns / 32; ++g) {
      x.set_scale(m, g, std::exp(random.normal()) / 32512.0F);
    }
  }
  x.finish();
}

void check_codes(const Subject& s, Format format) {
  s.report.check(
      s.name(std::string("product ") + format_name(format) + ", 1 to 8 rows"), [&](Check& check) {
        Random random(3);
        for (const auto& shape : shapes(s.small)) {
          const int64_t count = shape.rows * shape.columns;
          const CodeMatrix matrix(format,
                                  random_codes(random, format, count),
                                  random_scales(random, count / group_columns(format)),
                                  shape);
          for (int64_t rows = 1; rows <= kMaxRows; ++rows) {
            QuantizedRows x(rows, shape.columns);
            fill(x, random, shape.columns);
            check_product(
                s, check, matrix, {rows, nullptr, 0, x.rows()}, [&](int64_t m, int64_t j) {
                  return x.at(m, j);
                });
          }
        }
      });
}

// Activations in one group of 32 columns only, scales that are powers of two: what comes out is the
// integer sum, once rounded to float32.
void check_integers(const Subject& s, Format format) {
  s.report.check(
      s.name(std::string("product ") + format_name(format) + ": integer sums, bit for bit"),
      [&](Check& check) {
        Random random(4);
        const Shape shape{16, 128, 64};
        for (int round = 0; round < (s.small ? 20 : 200); ++round) {
          auto codes = random_codes(random, format, shape.rows * shape.columns);
          const auto most = static_cast<uint8_t>(code_count(format) - 1);
          if (round < 2) {
            codes.assign(codes.size(), round == 0 ? most : uint8_t{0});
          }
          const std::vector<Bf16> scales(codes.size() / static_cast<size_t>(group_columns(format)),
                                         to_bf16(0.25F));
          const CodeMatrix matrix(format, std::move(codes), scales, shape);
          const int64_t group = random.below(shape.columns / 32);
          QuantizedRows x(5, shape.columns);
          for (int64_t m = 0; m < x.count(); ++m) {
            x.set_scale(m, group, 0x1p-10F);
            for (int64_t j = 32 * group; j < 32 * group + 32; ++j) {
              const int64_t kind = random.below(6);  // row 0: the largest sums
              const int64_t value = kind == 0   ? -32512
                                    : kind == 1 ? -128
                                                : random.below(2 * 32512 + 1) - 32512;
              x.set(m, j, m == 0 ? 32512 : static_cast<int32_t>(value));
            }
          }
          x.finish();
          std::vector<float> y(static_cast<size_t>(x.count() * shape.rows));
          s.kernels.product(matrix.packed,
                            {0, 2},
                            {0, 1},
                            {x.count(), nullptr, 0, x.rows()},
                            y.data(),
                            shape.rows);
          for (int64_t i = 0; i < x.count() * shape.rows; ++i) {
            int64_t sum = 0;
            for (int64_t j = 32 * group; j < 32 * group + 32; ++j) {
              sum += matrix.code(i % shape.rows, j) * x.value(i / shape.rows, j);
            }
            check.same(y[static_cast<size_t>(i)], static_cast<float>(sum) * 0x1p-12F);
          }
        }
      });
}

// What a row of activations gives does not depend on how many others are there.
template <typename Matrix>
void compare_counts(Check& check, const Subject& s, const Matrix& matrix, const Rows& x) {
  const Packed& w = matrix.packed;
  const auto product = [&](const Rows& rows) {
    std::vector<float> y(static_cast<size_t>(rows.count * w.rows));
    s.kernels.product(w, {0, w.slices()}, {0, w.blocks()}, rows, y.data(), w.rows);
    return y;
  };
  std::vector<float> single;
  for (int64_t m = 0; m < x.count; ++m) {
    const auto* quantized = x.quantized != nullptr ? x.quantized + m : nullptr;
    const auto y = product({1, x.x != nullptr ? x.x + m * x.stride : nullptr, x.stride, quantized});
    single.insert(single.end(), y.begin(), y.end());
    const auto together = product({m + 1, x.x, x.stride, x.quantized});
    check.same(together, single);
  }
}

void check_counts(const Subject& s) {
  s.report.check(
      s.name("product: rows are the same alone and together, bit for bit"), [&](Check& check) {
        Random random(6);
        for (const Shape& shape : {Shape{32, 640, 640}, Shape{32, 640, 64}}) {
          const int64_t count = shape.rows * shape.columns;
          const LosslessMatrix lossless(awkward_weights(random, count, 4), shape);
          const auto x = random.normals(kMaxRows * shape.columns);
          compare_counts(check, s, lossless, {kMaxRows, x.data(), shape.columns, nullptr});
          for (const auto format : kCodeFormats) {
            const CodeMatrix codes(format,
                                   random_codes(random, format, count),
                                   random_scales(random, count / group_columns(format)),
                                   shape);
            QuantizedRows quantized(kMaxRows, shape.columns);
            fill(quantized, random, shape.columns);
            compare_counts(check, s, codes, {kMaxRows, nullptr, 0, quantized.rows()});
          }
        }
      });
}

}  // namespace

void check_products(const Subject& s) {
  for (int64_t count = 1; count <= kMaxRows; ++count) {
    check_lossless(s, count);
  }
  check_lossless_exact(s);
  check_counts(s);
  for (const auto format : kCodeFormats) {
    check_codes(s, format);
    check_integers(s, format);
  }
}

}  // namespace gemma_torch::kernels::test
