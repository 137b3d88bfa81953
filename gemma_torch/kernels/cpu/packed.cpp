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
  int64_t counts[128] = {};
  for (int64_t r = 0; r < kBlockRows; ++r) {
    for (int64_t j = 0; rows[r] != nullptr && j < columns; ++j) {
      ++counts[upper_exponent(rows[r][j])];
    }
  }
  int best = 0;
  int64_t most = -1;
  for (int base = 0; base < 128 - kCoded; ++base) {
    int64_t coded = 0;
    for (int i = 1; i <= kCoded; ++i) {
      coded += counts[base + i];
    }
    if (coded > most) {
      most = coded;
      best = base;
    }
  }
  return best;
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
    std::memset(cell, 0, 192);
    for (int64_t r = 0; r < kBlockRows; ++r) {
      for (int64_t i = 0; i < 8; ++i) {
        const Bf16 x = rows[r] == nullptr ? Bf16{0} : rows[r][j + i];
        const int upper = upper_exponent(x);
        const int code = upper == 0 ? 0 : upper - base;
        if (code < 0 || code > kCoded || (code == 0 && upper != 0)) {
          exceptions.push_back(
              {cell_index, static_cast<uint16_t>(j + i), static_cast<uint8_t>(r), 0, x, 0});
          continue;
        }
        const int64_t place = i / 4 * 64 + r / 4 * 16 + i / 2 % 2 * 8 + r % 4 * 2 + i % 2;
        auto& nibbles = cell[128 + place % 64];
        cell[place] = static_cast<uint8_t>(x.bits & 0xff);
        nibbles = static_cast<uint8_t>(nibbles | ((x.bits >> 15) << 3 | code) << (i / 4 * 4));
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
