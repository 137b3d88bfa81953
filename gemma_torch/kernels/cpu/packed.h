#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace gemma_torch::kernels {

/// A bfloat16 number: the upper half of a float32.
struct Bf16 {
  uint16_t bits;
};

/// Forms in which kernels read a weight matrix. kLossless12 gives back every bfloat16 bit for bit. The others are codes
/// and one bfloat16 scale of either sign for group_columns() columns of a row: code u of kIntN, N bits, stands for
/// (u - 2^(N-1)) * scale; one of kLevels4, 4 bits, for (kLevels[u] - 127) * scale.
enum class Format : uint8_t { kLossless12, kLevels4, kInt5, kInt6, kInt8 };

/// "lossless12", "levels4", "int5", "int6", "int8".
const char* format_name(Format format);
/// The format of a name. Throws nothing: false if there is none.
bool parse_format(const char* name, Format& format);

/// Finer near zero, where weights are many.
constexpr uint8_t kLevels[16] = {
    0, 39, 60, 77, 91, 104, 115, 127, 137, 147, 158, 170, 183, 198, 219, 254};

constexpr int64_t kBlockRows = 16;     // rows that are interleaved: one vector lane each
constexpr int64_t kSliceColumns = 64;  // columns of a slice, where a matrix is cut into slices

/// Columns that share a scale.
constexpr int64_t group_columns(Format format) {
  return format == Format::kLevels4 || format == Format::kInt8 ? 32 : 64;
}

/// How many codes there are.
constexpr int code_count(Format format) {
  return format == Format::kInt8   ? 256
         : format == Format::kInt6 ? 64
         : format == Format::kInt5 ? 32
                                   : 16;
}

/// What stands for zero among what a kernel multiplies: codes, or the levels they are indices of.
constexpr int code_zero(Format format) {
  return format == Format::kLevels4 ? 127 : code_count(format) / 2;
}

/// The number that a code stands for, in units of its scale.
constexpr int code_value(Format format, int code) {
  return (format == Format::kLevels4 ? kLevels[code] : code) - code_zero(format);
}

/// Codes per 32 columns of a block of 16 rows, in bytes.
constexpr int64_t code_bytes(Format format) {
  switch (format) {
    case Format::kLossless12:
      return 16 * 32 * 12 / 8;
    case Format::kLevels4:
      return 16 * 32 * 4 / 8;
    case Format::kInt5:
      return 16 * 32 * 5 / 8;
    case Format::kInt6:
      return 16 * 32 * 6 / 8;
    case Format::kInt8:
      return 16 * 32;
  }
  return 0;
}

/// Bytes of one cell: 16 rows by `columns`, a multiple of 64.
constexpr int64_t cell_bytes(Format format, int64_t columns) {
  const int64_t scales =
      format == Format::kLossless12 ? 0 : columns / group_columns(format) * kBlockRows * 2;
  return columns / 32 * code_bytes(format) + scales;
}

/// A weight that kLossless12 has no code for: its cell holds a zero there.
struct Exception {
  uint32_t cell;
  uint16_t column;  // within the cell
  uint8_t row;      // within the cell
  uint8_t unused;
  Bf16 value;
  uint16_t unused_too;
};

/// A matrix (rows, columns) as kernels read it: cells of 16 rows and `slice` columns, in the order slice by slice, in
/// each slice block of rows by block of rows. A product whose rows are shared out among threads has one slice of all
/// columns; one whose columns are, slices of 64. Either way what a thread reads lies in one piece.
///
/// Within a cell, columns follow each other in steps, 16 rows side by side in each:
///   kLossless12  steps of 8 columns, 192 bytes: 128 with the lower byte of each number (the exponent's last bit, then
///                the mantissa), then 64 with a nibble for its upper byte: the sign above three bits i that stand for
///                the exponent's first seven bits: `exponents[cell]` + i, or 0 if i is 0. So 14 exponents in a row have
///                codes, and zeros of both signs and denormals. Others are exceptions. The number of row r and column
///                c is byte 64 (c / 4) + 16 (r / 4) + 8 (c / 2 % 2) + 2 (r % 4) + c % 2; byte j of the second 64 has
///                its nibble in the upper half of byte j.
///   the others   steps of 4 columns: row by row 4 codes. kInt8: 64 bytes. Else low nibbles, two steps in 64 bytes, the
///                first in the lower halves; then for 32 columns the higher bits: kInt5 64 bytes, bit i for step i;
///                kInt6 128 bytes, 2 bits for each of four steps. A group ends with its 16 scales.
struct Packed {
  Format format = Format::kLossless12;
  int64_t rows = 0;     // a multiple of 16
  int64_t columns = 0;  // a multiple of 64
  int64_t slice = 0;    // columns of a cell
  const uint8_t* cells = nullptr;
  const uint8_t* exponents = nullptr;     // kLossless12: for each cell, see above
  const Exception* exceptions = nullptr;  // kLossless12: by cell
  int64_t exception_count = 0;

  int64_t blocks() const { return rows / kBlockRows; }
  int64_t slices() const { return columns / slice; }
  int64_t stride() const { return cell_bytes(format, slice); }
  int64_t bytes() const {
    return blocks() * slices() * stride() +
           exception_count * static_cast<int64_t>(sizeof(Exception)) +
           (format == Format::kLossless12 ? blocks() * slices() : 0);
  }
};

/// Encodes one cell. `rows` points at its 16 rows, each of `columns` bfloat16 numbers; a null row is zeros. Writes
/// cell_bytes(kLossless12, columns) bytes; returns what goes to `exponents`, and appends what has no code to
/// `exceptions`.
uint8_t encode_lossless(const Bf16* const* rows,
                        int64_t columns,
                        uint8_t* cell,
                        std::vector<Exception>& exceptions,
                        uint32_t cell_index);

/// Lays out codes (16, columns), each below code_count(format), and scales (16, columns / group), both row by
/// row, as a cell.
void encode_codes(
    Format format, const uint8_t* codes, const Bf16* scales, int64_t columns, uint8_t* cell);

/// Nearest bfloat16, ties to even.
Bf16 to_bf16(float x);
float to_float(Bf16 x);

}  // namespace gemma_torch::kernels
