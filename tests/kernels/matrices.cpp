#include "matrices.h"

namespace gemma_torch::kernels::test {
namespace {

size_t index(int64_t i) {
  return static_cast<size_t>(i);
}

Packed packed_as(Format format, const Shape& shape) {
  Packed packed;
  packed.format = format;
  packed.rows = shape.rows;
  packed.columns = shape.columns;
  packed.slice = shape.slice;
  return packed;
}

}  // namespace

LosslessMatrix::LosslessMatrix(std::vector<Bf16> values, const Shape& shape)
    : w(std::move(values)), packed(packed_as(Format::kLossless12, shape)) {
  const int64_t count = packed.blocks() * packed.slices();
  cells.resize(index(count * packed.stride()));
  exponents.resize(index(count));
  for (int64_t cell = 0; cell < count; ++cell) {
    const int64_t column = cell / packed.blocks() * shape.slice;
    const Bf16* rows[kBlockRows];
    for (int64_t r = 0; r < kBlockRows; ++r) {
      rows[r] = w.data() + (cell % packed.blocks() * kBlockRows + r) * shape.columns + column;
    }
    exponents[index(cell)] = encode_lossless(rows,
                                             shape.slice,
                                             cells.data() + cell * packed.stride(),
                                             exceptions,
                                             static_cast<uint32_t>(cell));
  }
  packed.cells = cells.data();
  packed.exponents = exponents.data();
  packed.exceptions = exceptions.data();
  packed.exception_count = static_cast<int64_t>(exceptions.size());
}

double LosslessMatrix::at(int64_t row, int64_t column) const {
  return to_float(w[index(row * packed.columns + column)]);
}

std::vector<Bf16> awkward_weights(Random& random, int64_t count, float large) {
  std::vector<Bf16> w(index(count));
  for (auto& value : w) {
    value = to_bf16(random.normal() * 0.05F);
    switch (random.below(200)) {
      case 0:
        value = {0};
        break;
      case 1:
        value = {0x8000};  // -0
        break;
      case 2:
        value = {static_cast<uint16_t>(random.below(128) | (random.below(2) << 15))};  // a denormal
        break;
      case 3:
        value = to_bf16(random.normal() * 0x1p-60F);
        break;
      default:
        break;
    }
    if (random.below(4000) == 0) {
      value = to_bf16(random.normal() * large);
    }
  }
  return w;
}

CodeMatrix::CodeMatrix(Format format,
                       std::vector<uint8_t> all_codes,
                       std::vector<Bf16> all_scales,
                       const Shape& shape)
    : codes(std::move(all_codes)), scales(std::move(all_scales)), packed(packed_as(format, shape)) {
  const int64_t count = packed.blocks() * packed.slices();
  const int64_t group = group_columns(format);
  cells.resize(index(count * packed.stride()));
  std::vector<uint8_t> part_codes(index(kBlockRows * shape.slice));
  std::vector<Bf16> part_scales(index(kBlockRows * shape.slice / group));
  for (int64_t cell = 0; cell < count; ++cell) {
    const int64_t column = cell / packed.blocks() * shape.slice;
    for (int64_t r = 0; r < kBlockRows; ++r) {
      const int64_t row = cell % packed.blocks() * kBlockRows + r;
      for (int64_t j = 0; j < shape.slice; ++j) {
        part_codes[index(r * shape.slice + j)] = codes[index(row * shape.columns + column + j)];
        part_scales[index((r * shape.slice + j) / group)] =
            scales[index((row * shape.columns + column + j) / group)];
      }
    }
    encode_codes(format,
                 part_codes.data(),
                 part_scales.data(),
                 shape.slice,
                 cells.data() + cell * packed.stride());
  }
  packed.cells = cells.data();
}

int64_t CodeMatrix::code(int64_t row, int64_t column) const {
  return code_value(packed.format, codes[index(row * packed.columns + column)]);
}

float CodeMatrix::scale(int64_t row, int64_t column) const {
  return to_float(scales[index((row * packed.columns + column) / group_columns(packed.format))]);
}

std::vector<uint8_t> random_codes(Random& random, Format format, int64_t count) {
  const int64_t most = code_count(format) - 1;
  std::vector<uint8_t> codes(index(count));
  for (auto& code : codes) {
    const int64_t kind = random.below(8);  // often the extremes
    code = static_cast<uint8_t>(kind == 0 ? 0 : kind == 1 ? most : random.below(most + 1));
  }
  return codes;
}

std::vector<Bf16> random_scales(Random& random, int64_t count) {
  std::vector<Bf16> scales(index(count));
  for (auto& scale : scales) {
    scale = to_bf16(random.below(50) == 0 ? 0.0F : 0.01F * std::exp(random.normal()));
  }
  return scales;
}

QuantizedRows::QuantizedRows(int64_t count, int64_t columns)
    : count_(count),
      columns_(columns),
      values_(index(count * columns)),
      sums_(index(count * columns / 32)),
      high_(values_.size()),
      low_(values_.size()),
      pairs_(values_.size()),
      scales_(sums_.size()) {
  for (int64_t m = 0; m < count; ++m) {
    const int64_t at = m * columns;
    rows_.push_back({high_.data() + at,
                     low_.data() + at,
                     pairs_.data() + at,
                     sums_.data() + at / 32,
                     scales_.data() + at / 32});
  }
}

void QuantizedRows::set(int64_t m, int64_t j, int32_t value) {
  constexpr int64_t kPlace[4] = {0, 2, 1, 3};
  const size_t at = index(m * columns_ + j);
  const int32_t high = (value + 128 + 0x10000) / 256 - 0x100;  // rounded down
  values_[at] = value;
  high_[at] = static_cast<int8_t>(high);
  low_[at] = static_cast<int8_t>(value - 256 * high);
  pairs_[index(m * columns_ + j / 4 * 4 + kPlace[j % 4])] = static_cast<int16_t>(value);
}

void QuantizedRows::set_scale(int64_t m, int64_t group, float scale) {
  scales_[index(m * columns_ / 32 + group)] = scale;
}

void QuantizedRows::finish() {
  for (size_t g = 0; g < sums_.size(); ++g) {
    sums_[g] = 0;
    for (size_t j = 0; j < 32; ++j) {
      sums_[g] += values_[32 * g + j];
    }
  }
}

double QuantizedRows::at(int64_t m, int64_t j) const {
  return static_cast<double>(value(m, j)) * scales_[index((m * columns_ + j) / 32)];
}

}  // namespace gemma_torch::kernels::test
