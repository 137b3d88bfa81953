#pragma once

#include <vector>

#include "check.h"

namespace gemma_torch::kernels::test {

struct Shape {
  int64_t rows, columns, slice;
};

/// A matrix of bfloat16 numbers and its lossless form.
struct LosslessMatrix {
  std::vector<Bf16> w;  // (rows, columns)
  std::vector<uint8_t> cells, exponents;
  std::vector<Exception> exceptions;
  Packed packed;  // points into the above: not to be copied

  /// `values` (rows, columns).
  LosslessMatrix(std::vector<Bf16> values, const Shape& shape);
  LosslessMatrix(const LosslessMatrix&) = delete;
  LosslessMatrix& operator=(const LosslessMatrix&) = delete;
  double at(int64_t row, int64_t column) const;
};

/// Weights as a model has them, zeros of both signs, and numbers too small or too large beside the
/// others to have a code: denormals, 2^-60, `large`. (With 512 nearly all others in a cell are
/// exceptions, added one after the other.)
std::vector<Bf16> awkward_weights(Random& random, int64_t count, float large);

/// A matrix of codes with scales.
struct CodeMatrix {
  std::vector<uint8_t> codes;  // (rows, columns)
  std::vector<Bf16> scales;    // (rows, columns / group)
  std::vector<uint8_t> cells;
  Packed packed;

  CodeMatrix(Format format,
             std::vector<uint8_t> all_codes,
             std::vector<Bf16> all_scales,
             const Shape& shape);
  CodeMatrix(const CodeMatrix&) = delete;
  CodeMatrix& operator=(const CodeMatrix&) = delete;
  int64_t code(int64_t row, int64_t column) const;  // less the offset
  float scale(int64_t row, int64_t column) const;
  double at(int64_t row, int64_t column) const {
    return static_cast<double>(code(row, column)) * scale(row, column);
  }
};

std::vector<uint8_t> random_codes(Random& random, Format format, int64_t count);
std::vector<Bf16> random_scales(Random& random, int64_t count);

/// Rows of activations in 16 bits, built from their definition.
class QuantizedRows {
 public:
  QuantizedRows(int64_t count, int64_t columns);
  QuantizedRows(const QuantizedRows&) = delete;
  QuantizedRows& operator=(const QuantizedRows&) = delete;
  /// Sets values[j] of row m, at most 32512 in size, everywhere but in `sums`: see finish.
  void set(int64_t m, int64_t j, int32_t value);
  void set_scale(int64_t m, int64_t group, float scale);
  void finish();  // sums
  int32_t value(int64_t m, int64_t j) const {
    return values_[static_cast<size_t>(m * columns_ + j)];
  }
  double at(int64_t m, int64_t j) const;
  const QuantizedRow* rows() const { return rows_.data(); }
  int64_t count() const { return count_; }

 private:
  int64_t count_, columns_;
  std::vector<int32_t> values_, sums_;
  std::vector<int8_t> high_, low_;
  std::vector<int16_t> pairs_;
  std::vector<float> scales_;
  std::vector<QuantizedRow> rows_;
};

constexpr Format kCodeFormats[] = {Format::kLevels4, Format::kInt5, Format::kInt6, Format::kInt8};

}  // namespace gemma_torch::kernels::test
