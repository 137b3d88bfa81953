#include "gemma_torch/kernels/cpu/packed.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

namespace gemma_torch::kernels {
namespace {

constexpr int kCoded = 7;  // values of an exponent's first seven bits that have codes, besides 0

int upper_exponent(Bf16 x) {
  return (x.bits >> 8) & 0x7f;
}

// The base with which the most numbers have a code: usually the largest number does, and all but the smallest ones.
int best_base(const Bf16* const* rows, int64_t columns) {
  uint32_t counts[8][128] =
      {};  // by column modulo 8: few exponents are common, and counts of one wait for each other
  for (int64_t r = 0; r < kBlockRows; ++r) {
    for (int64_t j = 0; rows[r] != nullptr && j < columns; j += 8) {
      for (int64_t i = 0; i < 8; ++i) {
        ++counts[i][upper_exponent(rows[r][j + i])];
      }
    }
  }
  uint32_t total[128] = {};
  for (const auto& some : counts) {
    for (int e = 0; e < 128; ++e) {
      total[e] += some[e];
    }
  }
  constexpr int kBases = 128 - kCoded;
  uint32_t coded[kBases] = {};
  for (int i = 1; i <= kCoded; ++i) {
    for (int base = 0; base < kBases; ++base) {
      coded[base] += total[base + i];
    }
  }
  return static_cast<int>(std::max_element(coded, coded + kBases) - coded);
}

// The vectors that every 64-bit CPU has: the encoder waits for memory before it would for these.
using Bytes = uint8_t __attribute__((vector_size(16)));
using SignedBytes = int8_t __attribute__((vector_size(16)));
using Pairs = uint16_t __attribute__((vector_size(16)));

// Eight columns of two rows, row by row. Where `known` is 0, a number has no code and the others are 0.
struct CodedRows {
  Bytes lower, nibbles, known;
};

CodedRows code_rows(const Bf16* first, const Bf16* second, int base) {
  Bytes a = {}, b = {};
  if (first != nullptr) {
    std::memcpy(&a, first, sizeof a);
  }
  if (second != nullptr) {
    std::memcpy(&b, second, sizeof b);
  }
  const Bytes lower =
      __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const Bytes upper =
      __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  const auto exponent = std::bit_cast<SignedBytes>(upper & 0x7f);
  const SignedBytes code = exponent - static_cast<int8_t>(base);  // -120 .. 127
  const auto coded = std::bit_cast<Bytes>((code > 0) & (code <= kCoded));
  const Bytes known = coded | std::bit_cast<Bytes>(exponent == 0);
  const Bytes nibbles = ((upper >> 4) & 8) | (std::bit_cast<Bytes>(code) & coded);
  return {lower & known, nibbles & known, known};
}

// Four rows of eight columns, row by row in two vectors -> two columns at a time, row by row: columns 0 to 3, 4 to 7.
struct Turned {
  Bytes low, high;
};

Turned turned(Bytes rows01, Bytes rows23) {
  const auto a = std::bit_cast<Pairs>(rows01), b = std::bit_cast<Pairs>(rows23);
  const Pairs even = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);   // rows 0, 2
  const Pairs odd = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);  // rows 1, 3
  return {std::bit_cast<Bytes>(__builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11)),
          std::bit_cast<Bytes>(__builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15))};
}

// One step of a cell: eight columns from `column` on. Whether all numbers have codes.
bool encode_step(const Bf16* const* rows, int64_t column, int base, uint8_t* to) {
  Bytes known = ~Bytes{};
  for (int64_t r = 0; r < kBlockRows; r += 4) {
    const auto at = [&](int64_t row) {
      return rows[row] == nullptr ? nullptr : rows[row] + column;
    };
    const auto a = code_rows(at(r), at(r + 1), base);
    const auto b = code_rows(at(r + 2), at(r + 3), base);
    const auto lower = turned(a.lower, b.lower);
    const auto nibbles = turned(a.nibbles, b.nibbles);
    const Bytes both = nibbles.low | nibbles.high << 4;
    std::memcpy(to + 4 * r, &lower.low, sizeof lower.low);
    std::memcpy(to + 64 + 4 * r, &lower.high, sizeof lower.high);
    std::memcpy(to + 128 + 4 * r, &both, sizeof both);
    known &= a.known & b.known;
  }
  uint64_t halves[2];
  std::memcpy(halves, &known, sizeof halves);
  return (halves[0] & halves[1]) == ~uint64_t{0};
}

bool has_code(Bf16 x, int base) {
  const int upper = upper_exponent(x);
  return upper == 0 || (upper > base && upper <= base + kCoded);
}

void put_high_bits(Format format, uint8_t* high, int64_t step, int64_t lane, uint8_t code) {
  if (format == Format::kInt5) {
    high[lane] = static_cast<uint8_t>(high[lane] | ((code >> 4) & 1) << step);
  } else if (format == Format::kInt6) {
    auto& byte = high[step / 4 * 64 + lane];
    byte = static_cast<uint8_t>(byte | ((code >> 4) & 3) << (2 * (step % 4)));
  }
}

}  // namespace

Bf16 to_bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const bool nan = (bits & 0x7fffffffU) > 0x7f800000U;
  return {static_cast<uint16_t>(nan ? 0x7fc0U : (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16)};
}

float to_float(Bf16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

uint8_t encode_lossless(const Bf16* const* rows,
                        int64_t columns,
                        uint8_t* cell,
                        std::vector<Exception>& exceptions,
                        uint32_t cell_index) {
  const int base = best_base(rows, columns);
  for (int64_t j = 0; j < columns; j += 8, cell += 192) {
    if (encode_step(rows, j, base, cell)) {
      continue;
    }
    for (int64_t r = 0; r < kBlockRows; ++r) {
      for (int64_t i = 0; rows[r] != nullptr && i < 8; ++i) {
        const Bf16 x = rows[r][j + i];
        if (!has_code(x, base)) {
          exceptions.push_back(
              {cell_index, static_cast<uint16_t>(j + i), static_cast<uint8_t>(r), 0, x, 0});
        }
      }
    }
  }
  return static_cast<uint8_t>(base);
}

void encode_codes(
    Format format, const uint8_t* codes, const Bf16* scales, int64_t columns, uint8_t* cell) {
  const int64_t group = group_columns(format);
  for (int64_t j = 0; j < columns; j += 32) {
    std::memset(cell, 0, static_cast<size_t>(code_bytes(format)));
    for (int64_t step = 0; step < 8; ++step) {
      for (int64_t lane = 0; lane < 64; ++lane) {
        const uint8_t code = codes[lane / 4 * columns + j + step * 4 + lane % 4];
        if (format == Format::kInt8) {
          cell[step * 64 + lane] = code;
          continue;
        }
        auto& byte = cell[step / 2 * 64 + lane];
        byte = static_cast<uint8_t>(byte | (code & 0xf) << (4 * (step % 2)));
        put_high_bits(format, cell + 256, step, lane, code);
      }
    }
    cell += code_bytes(format);
    if ((j + 32) % group == 0) {
      for (int64_t r = 0; r < kBlockRows; ++r, cell += 2) {
        std::memcpy(cell, &scales[r * (columns / group) + j / group], sizeof(Bf16));
      }
    }
  }
}

namespace {

constexpr std::pair<Format, const char*> kNames[] = {{Format::kLossless12, "lossless12"},
                                                     {Format::kLevels4, "levels4"},
                                                     {Format::kInt5, "int5"},
                                                     {Format::kInt6, "int6"},
                                                     {Format::kInt8, "int8"}};

}  // namespace

const char* format_name(Format format) {
  for (const auto& [known, name] : kNames) {
    if (known == format) {
      return name;
    }
  }
  return "";
}

bool parse_format(const char* name, Format& format) {
  for (const auto& [known, its_name] : kNames) {
    if (std::strcmp(name, its_name) == 0) {
      format = known;
      return true;
    }
  }
  return false;
}

}  // namespace gemma_torch::kernels
