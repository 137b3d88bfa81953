// Products of packed weights with one to eight rows of activations. Weights are read once, in order.

#include "gemma_torch/kernels/cpu/fused_kernels.h"
#include "gemma_torch/kernels/cpu/lanes.h"

namespace gemma_torch::kernels::GEMMA_TORCH_ISA {
namespace {

// ---- kLossless12

// The upper bytes of bfloat16 numbers from their codes, see Packed.
class UpperBytes {
 public:
  explicit UpperBytes(uint8_t base) {
    uint8_t bytes[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      bytes[i] = static_cast<uint8_t>((i & 8) << 4 | ((i & 7) == 0 ? 0 : base + (i & 7)));
    }
    table_ = load_as<PartU8>(bytes);
    base_ = PartU8{} + base;
  }

  // Those of the lower nibbles, or of the upper ones.
  template <int kHalf>
  GEMMA_TORCH_INLINE PartU8 of(PartU8 nibbles) const {
#if defined(__AVX512VBMI__)
    // Looks at six bits of a byte; the table stands there four times.
    const auto index = std::bit_cast<__m512i>(nibbles);
    return std::bit_cast<PartU8>(_mm512_permutexvar_epi8(kHalf == 0 ? index : _mm512_srli_epi16(index, 4),
                                                         std::bit_cast<__m512i>(table_)));
#elif defined(__AVX2__)
    const auto both = std::bit_cast<__m256i>(nibbles);
    const __m256i index = _mm256_and_si256(kHalf == 0 ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
    return std::bit_cast<PartU8>(_mm256_shuffle_epi8(std::bit_cast<__m256i>(table_), index));
#elif defined(__aarch64__)
    return std::bit_cast<PartU8>(vqtbl1q_u8(
        std::bit_cast<uint8x16_t>(table_), std::bit_cast<uint8x16_t>(kHalf == 0 ? nibbles & 15 : nibbles >> 4)));
#else
    const PartU8 index = kHalf == 0 ? nibbles & 15 : nibbles >> 4;
    const PartU8 pair = index & 7;
    return (index & 8) << 4 | (pair + (base_ & std::bit_cast<PartU8>(pair != 0)));
#endif
  }

 private:
  PartU8 table_, base_;
};

// Bytes of a and b by turns, a's first, in each 16 bytes: from their lower eight, or their upper eight.
template <int kHalf>
GEMMA_TORCH_INLINE PartU zip_bytes(PartU8 a, PartU8 b) {
#if defined(__AVX512BW__)
  const auto x = std::bit_cast<__m512i>(a), y = std::bit_cast<__m512i>(b);
  return std::bit_cast<PartU>(kHalf == 0 ? _mm512_unpacklo_epi8(x, y) : _mm512_unpackhi_epi8(x, y));
#elif defined(__AVX2__)
  const auto x = std::bit_cast<__m256i>(a), y = std::bit_cast<__m256i>(b);
  return std::bit_cast<PartU>(kHalf == 0 ? _mm256_unpacklo_epi8(x, y) : _mm256_unpackhi_epi8(x, y));
#else
  return std::bit_cast<PartU>(
      kHalf == 0 ? __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
                 : __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
#endif
}

// Eight columns of some of the rows, bit for bit: for each two columns and row the even one's bits below the odd one's.
GEMMA_TORCH_INLINE void lossless_step(const uint8_t* step, int part, const UpperBytes& upper, PartU pairs[4]) {
  const auto nibbles = load_as<PartU8>(step + 128 + part * kWidth);
  const auto low0 = load_as<PartU8>(step + part * kWidth);
  const auto low1 = load_as<PartU8>(step + 64 + part * kWidth);
  const PartU8 high0 = upper.of<0>(nibbles);
  const PartU8 high1 = upper.of<1>(nibbles);
  pairs[0] = zip_bytes<0>(low0, high0);
  pairs[1] = zip_bytes<1>(low0, high0);
  pairs[2] = zip_bytes<0>(low1, high1);
  pairs[3] = zip_bytes<1>(low1, high1);
}

GEMMA_TORCH_INLINE PartF even_of(PartU pairs) { return std::bit_cast<PartF>(pairs << 16); }
GEMMA_TORCH_INLINE PartF odd_of(PartU pairs) { return std::bit_cast<PartF>(pairs & 0xffff0000U); }

// Independent sums for a row of activations; as many hide how long an addition takes.
constexpr int kChains = kParts == 1 ? 4 : 2;

// Parts of a block's rows whose sums fit the registers at a time.
constexpr int parts_at_once(int rows) { return rows >= 4 ? 1 : 4 / rows < kParts ? 4 / rows : kParts; }

// Columns of a cell, for `kCount` parts of its rows, onto sums[part][row]. The order in which a number is summed up
// depends neither on kRows nor on kCount.
template <int kRows, int kCount, bool kPrefetch>
GEMMA_TORCH_INLINE void lossless_columns(const uint8_t* cell, const UpperBytes& upper, int64_t columns, const float* x,
                                         int64_t stride, int first_part, PartF (*sums)[kRows][kChains]) {
  PartF acc[kCount][kRows][kChains];
  std::memcpy(acc, sums, sizeof acc);
  for (int64_t j = 0; j < columns; j += 8, cell += 192) {
    if constexpr (kPrefetch) {
      prefetch_stream(cell, 192);
    }
    for (int p = 0; p < kCount; ++p) {
      PartU pairs[4];
      lossless_step(cell, first_part + p, upper, pairs);
      for (int i = 0; i < 4; ++i) {
        const PartF even = even_of(pairs[i]), odd = odd_of(pairs[i]);
        for (int m = 0; m < kRows; ++m) {
          const float* xm = x + m * stride + j + 2 * i;
          PartF& a = acc[p][m][2 * i % kChains];
          PartF& b = acc[p][m][2 * i % kChains + 1];
          a = fma(even, splat_part(xm[0]), a);
          b = fma(odd, splat_part(xm[1]), b);
        }
      }
    }
  }
  std::memcpy(sums, acc, sizeof acc);
}

// y[part][row] = the cell's sums.
template <int kRows>
GEMMA_TORCH_INLINE void lossless_cell(const uint8_t* cell, uint8_t base, int64_t columns, const float* x,
                                      int64_t stride, PartF (*y)[kRows]) {
  const UpperBytes upper(base);
  PartF sums[kParts][kRows][kChains] = {};
  constexpr int kAtOnce = parts_at_once(kRows);
  if constexpr (kAtOnce == kParts) {
    lossless_columns<kRows, kParts, true>(cell, upper, columns, x, stride, 0, sums);
  } else {
    constexpr int64_t kSome = 64;  // columns
    for (int64_t j = 0; j < columns; j += kSome, cell += kSome / 8 * 192) {
      lossless_columns<kRows, kAtOnce, true>(cell, upper, kSome, x + j, stride, 0, sums);
      for (int p = kAtOnce; p < kParts; p += kAtOnce) {
        lossless_columns<kRows, kAtOnce, false>(cell, upper, kSome, x + j, stride, p, sums + p);
      }
    }
  }
  for (int p = 0; p < kParts; ++p) {
    for (int m = 0; m < kRows; ++m) {
      const auto& s = sums[p][m];
      y[p][m] = kChains == 2 ? s[0] + s[1] : (s[0] + s[1]) + (s[kChains - 2] + s[kChains - 1]);
    }
  }
}

// ---- codes

// The levels whose indices are the bytes' lower halves; the upper ones are zeros.
GEMMA_TORCH_INLINE PartU levels_of(PartU indices) {
#if defined(__AVX512F__)
  return std::bit_cast<PartU>(
      _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load_as<__m128i>(kLevels)), std::bit_cast<__m512i>(indices)));
#elif defined(__AVX2__)
  return std::bit_cast<PartU>(
      _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_as<__m128i>(kLevels)), std::bit_cast<__m256i>(indices)));
#elif defined(__aarch64__)
  return std::bit_cast<PartU>(vqtbl1q_u8(vld1q_u8(kLevels), std::bit_cast<uint8x16_t>(indices)));
#else
  uint8_t bytes[kWidth];
  std::memcpy(bytes, &indices, sizeof bytes);
  for (auto& b : bytes) {
    b = kLevels[b];
  }
  return load_as<PartU>(bytes);
#endif
}

// What is multiplied in two steps of 4 columns, a byte each, for a part of the rows.
struct TwoSteps {
  PartU step[2];
};

// Keeps g++ from loading x again for each use, where loads are what there is least time for.
GEMMA_TORCH_INLINE void keep([[maybe_unused]] PartU& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#endif
}

// Codes, or their levels, in steps 2 i and 2 i + 1 of 32 columns. `p` points at the part's first bytes.
template <Format kFormat>
GEMMA_TORCH_INLINE TwoSteps codes_at(const uint8_t* p, int i) {
  if constexpr (kFormat == Format::kInt8) {
    return {load_as<PartU>(p + 128 * i), load_as<PartU>(p + 128 * i + 64)};
  }
  auto two = load_as<PartU>(p + 64 * i);
  keep(two);
#if defined(__AVX512VBMI__)
  if constexpr (kFormat == Format::kLevels4) {
    // Looks at six bits of a byte; the table stands there four times.
    const __m512i table = _mm512_broadcast_i32x4(load_as<__m128i>(kLevels));
    const auto level = [&](PartU indices) {
      return std::bit_cast<PartU>(_mm512_permutexvar_epi8(std::bit_cast<__m512i>(indices), table));
    };
    return {level(two), level(two >> 4)};
  }
#endif
  const PartU low[2] = {two & 0x0f0f0f0fU, (two >> 4) & 0x0f0f0f0fU};
  if constexpr (kFormat == Format::kInt5) {
    const auto high = load_as<PartU>(p + 256);
    const auto bit = [&](int step) { return (step < 4 ? high << (4 - step) : high >> (step - 4)) & 0x10101010U; };
    return {low[0] | bit(2 * i), low[1] | bit(2 * i + 1)};
  }
  if constexpr (kFormat == Format::kInt6) {
    const auto high = load_as<PartU>(p + 256 + 64 * (i / 2));
    const auto bits = [&](int at) { return (at < 4 ? high << (4 - at) : high >> (at - 4)) & 0x30303030U; };
    return {low[0] | bits(2 * (2 * i % 4)), low[1] | bits(2 * (2 * i % 4 + 1))};
  }
  return {levels_of(low[0]), levels_of(low[1])};
}

// The largest that codes_at gives.
constexpr int largest_of(Format format) {
  return format == Format::kLevels4 ? kLevels[15] : code_count(format) - 1;
}

GEMMA_TORCH_INLINE int32_t four_bytes(const void* p) {
  int32_t all;
  std::memcpy(&all, p, sizeof all);
  return all;
}

// The sum over 32 columns of code * value, exact in 32 bits, step by step. Codes are at most kLargest.
template <int kLargest>
class Dot {
 public:
  // Four columns of activations, for all lanes.
  struct Columns;
  static Columns columns(const QuantizedRow& x, int64_t column);
#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD) || defined(__AVX2__)
  // Columns of its own for each lane.
  static Columns lanes(const int8_t* high, const int8_t* low);
#endif
  void add(PartU codes, const Columns& x, int step);
  // Of code - offset, given the sum of the values.
  PartI total(int offset, int32_t sum) const;

#if defined(__AVX512VNNI__)
 private:
  __m512i high_[2] = {}, low_[2] = {};  // two sums each: a longer chain takes longer than its work
#elif defined(__ARM_FEATURE_DOTPROD)
 private:
  int32x4_t high_ = {}, low_ = {};
#elif defined(__AVX2__)
 private:
  // Products with bytes, where some of them, each the sum of two, fit 16 bits.
  static constexpr bool kBytes = kLargest <= 63;
  static constexpr int kSteps = kLargest <= 15 ? 8 : kLargest <= 31 ? 4 : 2;
  __m256i total_ = {}, high_ = {}, low_ = {};
#else
 private:
  PartI total_ = {};
#endif
};

#if defined(__AVX512VNNI__)
template <int kLargest>
struct Dot<kLargest>::Columns {
  __m512i high, low;
};
template <int kLargest>
GEMMA_TORCH_INLINE auto Dot<kLargest>::columns(const QuantizedRow& x, int64_t column) -> Columns {
  return {_mm512_set1_epi32(four_bytes(x.high + column)), _mm512_set1_epi32(four_bytes(x.low + column))};
}
template <int kLargest>
GEMMA_TORCH_INLINE auto Dot<kLargest>::lanes(const int8_t* high, const int8_t* low) -> Columns {
  return {load_as<__m512i>(high), load_as<__m512i>(low)};
}
template <int kLargest>
GEMMA_TORCH_INLINE void Dot<kLargest>::add(PartU codes, const Columns& x, int step) {
  high_[step % 2] = _mm512_dpbusd_epi32(high_[step % 2], std::bit_cast<__m512i>(codes), x.high);
  low_[step % 2] = _mm512_dpbusd_epi32(low_[step % 2], std::bit_cast<__m512i>(codes), x.low);
}
template <int kLargest>
GEMMA_TORCH_INLINE PartI Dot<kLargest>::total(int offset, int32_t sum) const {
  const __m512i high = _mm512_slli_epi32(_mm512_add_epi32(high_[0], high_[1]), 8);
  return std::bit_cast<PartI>(_mm512_add_epi32(high, _mm512_add_epi32(low_[0], low_[1]))) - offset * sum;
}
#elif defined(__ARM_FEATURE_DOTPROD)
template <int kLargest>
struct Dot<kLargest>::Columns {
  int8x16_t high, low;
};
template <int kLargest>
GEMMA_TORCH_INLINE auto Dot<kLargest>::columns(const QuantizedRow& x, int64_t column) -> Columns {
  return {vreinterpretq_s8_s32(vdupq_n_s32(four_bytes(x.high + column))),
          vreinterpretq_s8_s32(vdupq_n_s32(four_bytes(x.low + column)))};
}
template <int kLargest>
GEMMA_TORCH_INLINE auto Dot<kLargest>::lanes(const int8_t* high, const int8_t* low) -> Columns {
  return {vld1q_s8(high), vld1q_s8(low)};
}
template <int kLargest>
GEMMA_TORCH_INLINE void Dot<kLargest>::add(PartU codes, const Columns& x, int /*step*/) {
  // Where codes have eight bits, code - 128 as a signed byte.
  const auto code = std::bit_cast<int8x16_t>(kLargest > 127 ? codes ^ 0x80808080U : codes);
  high_ = vdotq_s32(high_, code, x.high);
  low_ = vdotq_s32(low_, code, x.low);
}
template <int kLargest>
GEMMA_TORCH_INLINE PartI Dot<kLargest>::total(int offset, int32_t sum) const {
  return std::bit_cast<PartI>(vaddq_s32(vshlq_n_s32(high_, 8), low_)) + ((kLargest > 127 ? 128 : 0) - offset) * sum;
}
#elif defined(__AVX2__)
template <int kLargest>
struct Dot<kLargest>::Columns {
  __m256i high, low;  // bytes; or the values of columns 0 and 2, 1 and 3
};
template <int kLargest>
GEMMA_TORCH_INLINE auto Dot<kLargest>::columns(const QuantizedRow& x, int64_t column) -> Columns {
  if constexpr (kBytes) {
    return {_mm256_set1_epi32(four_bytes(x.high + column)), _mm256_set1_epi32(four_bytes(x.low + column))};
  }
  return {_mm256_set1_epi32(four_bytes(x.pairs + column)), _mm256_set1_epi32(four_bytes(x.pairs + column + 2))};
}
template <int kLargest>
GEMMA_TORCH_INLINE auto Dot<kLargest>::lanes(const int8_t* high, const int8_t* low) -> Columns {
  static_assert(kBytes);
  return {load_as<__m256i>(high), load_as<__m256i>(low)};
}
template <int kLargest>
GEMMA_TORCH_INLINE void Dot<kLargest>::add(PartU codes, const Columns& x, int step) {
  const auto code = std::bit_cast<__m256i>(codes);
  if constexpr (kBytes) {
    const bool first = step % kSteps == 0;
    const __m256i high = _mm256_maddubs_epi16(code, x.high), low = _mm256_maddubs_epi16(code, x.low);
    high_ = first ? high : _mm256_add_epi16(high_, high);
    low_ = first ? low : _mm256_add_epi16(low_, low);
    if (step % kSteps == kSteps - 1) {
      total_ = _mm256_add_epi32(total_, _mm256_madd_epi16(high_, _mm256_set1_epi16(256)));
      total_ = _mm256_add_epi32(total_, _mm256_madd_epi16(low_, _mm256_set1_epi16(1)));
    }
  } else {
    const __m256i even = _mm256_and_si256(code, _mm256_set1_epi32(0x00ff00ff));
    total_ = _mm256_add_epi32(total_, _mm256_madd_epi16(even, x.high));
    total_ = _mm256_add_epi32(total_, _mm256_madd_epi16(_mm256_srli_epi16(code, 8), x.low));
  }
}
template <int kLargest>
GEMMA_TORCH_INLINE PartI Dot<kLargest>::total(int offset, int32_t sum) const {
  return std::bit_cast<PartI>(total_) - offset * sum;
}
#else
template <int kLargest>
struct Dot<kLargest>::Columns {
  const int16_t* v;
};
template <int kLargest>
GEMMA_TORCH_INLINE auto Dot<kLargest>::columns(const QuantizedRow& x, int64_t column) -> Columns {
  return {x.pairs + column};
}
template <int kLargest>
GEMMA_TORCH_INLINE void Dot<kLargest>::add(PartU codes, const Columns& x, int /*step*/) {
  const auto c = std::bit_cast<PartI>(codes);
  total_ += (c & 0xff) * x.v[0] + ((c >> 16) & 0xff) * x.v[1] + ((c >> 8) & 0xff) * x.v[2] + ((c >> 24) & 0xff) * x.v[3];
}
template <int kLargest>
GEMMA_TORCH_INLINE PartI Dot<kLargest>::total(int offset, int32_t sum) const {
  return total_ - offset * sum;
}
#endif

// sums[part][row] = the sum over 32 columns, from `column` on, of (code - kZero) * value; code(part, i) gives the codes
// of steps 2 i and 2 i + 1.
template <int kLargest, int kZero, int kRows, typename Code>
GEMMA_TORCH_INLINE void dot_codes(const Code& code, const QuantizedRow* x, int64_t column, PartF (*sums)[kRows]) {
  constexpr int kAtOnce = parts_at_once(kRows);
  for (int p = 0; p < kParts; p += kAtOnce) {
    if (p > 0) {
      asm volatile("" ::: "memory");  // activations are to be loaded again, not kept: they would not fit the registers
    }
    Dot<kLargest> dots[kAtOnce][kRows];
    unrolled<4>([&](auto two) __attribute__((always_inline)) {
      TwoSteps codes[kAtOnce];
      for (int i = 0; i < kAtOnce; ++i) {
        codes[i] = code(p + i, two);
      }
      unrolled<2>([&](auto half) __attribute__((always_inline)) {
        constexpr int kStep = 2 * two + half;
        for (int m = 0; m < kRows; ++m) {
          const auto columns = Dot<kLargest>::columns(x[m], column + 4 * kStep);
          for (int i = 0; i < kAtOnce; ++i) {
            dots[i][m].add(codes[i].step[half], columns, kStep);
          }
        }
      });
    });
    for (int m = 0; m < kRows; ++m) {
      for (int i = 0; i < kAtOnce; ++i) {
        sums[p + i][m] = to_floats(dots[i][m].total(kZero, x[m].sums[column / 32]));
      }
    }
  }
}

// y[part][row] = the cell's sums.
template <Format kFormat, int kRows>
GEMMA_TORCH_INLINE void int_cell(const uint8_t* cell, int64_t first, int64_t columns, const QuantizedRow* x,
                                 PartF (*y)[kRows]) {
  constexpr int64_t kGroup = group_columns(kFormat);
  PartF acc[kParts][kRows] = {};
  for (int64_t j = 0; j < columns; j += kGroup) {
    PartF group[kParts][kRows] = {};
    for (int64_t i = 0; i < kGroup; i += 32, cell += code_bytes(kFormat)) {
      prefetch_stream(cell, code_bytes(kFormat));
      const auto code = [&](int part, int two) { return codes_at<kFormat>(cell + part * kWidth, two); };
      PartF sums[kParts][kRows];
      const int64_t column = first + j + i;
      dot_codes<largest_of(kFormat), code_zero(kFormat), kRows>(code, x, column, sums);
      for (int p = 0; p < kParts; ++p) {
        for (int m = 0; m < kRows; ++m) {
          // A product and a sum in one, by name: so a row comes out the same however many there are.
          group[p][m] = fma(sums[p][m], splat_part(x[m].scales[column / 32]), group[p][m]);
        }
      }
    }
    for (int p = 0; p < kParts; ++p) {
      const PartF scale = load_part(reinterpret_cast<const Bf16*>(cell) + p * kPartLanes);
      for (int m = 0; m < kRows; ++m) {
        acc[p][m] = fma(group[p][m], scale, acc[p][m]);
      }
    }
    cell += kBlockRows * 2;
  }
  std::memcpy(y, acc, sizeof acc);
}

template <Format kFormat, int kRows>
GEMMA_TORCH_INLINE void any_cell(const Packed& w, const uint8_t* cell, int64_t index, int64_t column,
                                 const Rows& x, int64_t first_row, PartF (*y)[kRows]) {
  if constexpr (kFormat == Format::kLossless12) {
    lossless_cell<kRows>(cell, w.exponents[index], w.slice, x.x + first_row * x.stride + column, x.stride, y);
  } else {
    int_cell<kFormat, kRows>(cell, column, w.slice, x.quantized + first_row, y);
  }
}

// ---- all

struct Output {
  float* y;
  int64_t stride;
};

template <Format kFormat, int kRows>
void product_rows(const Packed& packed, Range slices, Range blocks, const Rows& rows, int64_t first_row, Output out) {
  // Copies, which no store to y can be thought to change.
  const Packed w = packed;
  const Rows x = rows;
  const int64_t stride = cell_bytes(kFormat, w.slice);
  for (int64_t s = slices.begin; s < slices.end; ++s) {
    const int64_t column = s * w.slice, first = s * w.blocks();
    const uint8_t* cell = w.cells + (first + blocks.begin) * stride;
    for (int64_t b = blocks.begin; b < blocks.end; ++b, cell += stride) {
      PartF sums[kParts][kRows];
      any_cell<kFormat, kRows>(w, cell, first + b, column, x, first_row, sums);
      for (int m = 0; m < kRows; ++m) {
        float* y = out.y + (first_row + m) * out.stride + b * kBlockRows;
        for (int p = 0; p < kParts; ++p) {
          store_as(y + p * kPartLanes, load_as<PartF>(y + p * kPartLanes) + sums[p][m]);
        }
      }
    }
  }
}

// The first exception of a cell, or past it. (std::lower_bound would be compiled for this instruction set here and
// might then be the copy that other files call.)
GEMMA_TORCH_INLINE const Exception* first_exception(const Packed& w, uint32_t cell) {
  const Exception* e = w.exceptions;
  for (int64_t n = w.exception_count; n > 0;) {
    const int64_t half = n / 2;
    if (e[half].cell < cell) {
      e += half + 1;
      n -= half + 1;
    } else {
      n = half;
    }
  }
  return e;
}

// Exceptions of the cells [first, last).
struct Exceptions {
  const Exception *begin, *end;
};
GEMMA_TORCH_INLINE Exceptions exceptions_of(const Packed& w, int64_t first, int64_t last) {
  const auto at = [&](int64_t cell) {
    return cell == 0                        ? w.exceptions
           : cell == w.blocks() * w.slices() ? w.exceptions + w.exception_count
                                             : first_exception(w, static_cast<uint32_t>(cell));
  };
  return {at(first), at(last)};
}

// What some cells have no code for. Block and slice of a cell are counted up rather than divided for.
void add_exceptions(const Packed& w, Exceptions some, const Rows& x, Output out) {
  int64_t slice = 0, first = 0;  // cell of the slice
  for (const Exception* e = some.begin; e != some.end; ++e) {
    const auto cell = static_cast<int64_t>(e->cell);
    for (; cell >= first + w.blocks(); ++slice) {
      first += w.blocks();
    }
    const int64_t row = (cell - first) * kBlockRows + e->row;
    for (int64_t m = 0; m < x.count; ++m) {
      out.y[m * out.stride + row] += widen(e->value) * x.x[m * x.stride + slice * w.slice + e->column];
    }
  }
}

// Rows beyond four are a second pass over a cell that then lies in the innermost cache: cell by cell.
template <Format kFormat>
void product_any(const Packed& w, Range slices, Range blocks, const Rows& x, Output out) {
  switch (x.count) {
    case 1:
      return product_rows<kFormat, 1>(w, slices, blocks, x, 0, out);
    case 2:
      return product_rows<kFormat, 2>(w, slices, blocks, x, 0, out);
    default:
      break;
  }
  for (int64_t s = slices.begin; s < slices.end; ++s) {
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      int64_t m = 0;
      for (; m + 4 <= x.count; m += 4) {
        product_rows<kFormat, 4>(w, {s, s + 1}, {b, b + 1}, x, m, out);
      }
      for (; m < x.count; ++m) {
        product_rows<kFormat, 1>(w, {s, s + 1}, {b, b + 1}, x, m, out);
      }
    }
  }
}

// Exceptions are few, but rarely in any cache: those of whole slices are asked for before the last of them.
void product_lossless(const Packed& w, Range slices, Range blocks, const Rows& x, Output out) {
  constexpr auto kFormat = Format::kLossless12;
  if (w.exception_count == 0 || slices.begin >= slices.end) {
    return product_any<kFormat>(w, slices, blocks, x, out);
  }
  if (blocks.begin > 0 || blocks.end < w.blocks()) {
    product_any<kFormat>(w, slices, blocks, x, out);
    for (int64_t s = slices.begin; s < slices.end; ++s) {
      add_exceptions(w, exceptions_of(w, s * w.blocks() + blocks.begin, s * w.blocks() + blocks.end), x, out);
    }
    return;
  }
  const auto some = exceptions_of(w, slices.begin * w.blocks(), slices.end * w.blocks());
  const Range last{slices.end - 1, slices.end};
  product_any<kFormat>(w, {slices.begin, last.begin}, blocks, x, out);
  constexpr int64_t kMost = 4096;
  const auto bytes = static_cast<int64_t>(some.end - some.begin) * static_cast<int64_t>(sizeof(Exception));
  for (int64_t i = 0; i < bytes && i < kMost; i += 64) {
    prefetch_later(reinterpret_cast<const char*>(some.begin) + i);
  }
  product_any<kFormat>(w, last, blocks, x, out);
  add_exceptions(w, some, x, out);
}

void product(const Packed& w, Range slices, Range blocks, const Rows& x, float* y, int64_t y_stride) {
  const Output out{y, y_stride};
  switch (w.format) {
    case Format::kLossless12:
      return product_lossless(w, slices, blocks, x, out);
    case Format::kLevels4:
      return product_any<Format::kLevels4>(w, slices, blocks, x, out);
    case Format::kInt5:
      return product_any<Format::kInt5>(w, slices, blocks, x, out);
    case Format::kInt6:
      return product_any<Format::kInt6>(w, slices, blocks, x, out);
    case Format::kInt8:
      return product_any<Format::kInt8>(w, slices, blocks, x, out);
  }
}

}  // namespace
}  // namespace gemma_torch::kernels::GEMMA_TORCH_ISA
