// Built with -ffp-contract=off: a fused multiply-add in d * q - m would round once where the format
// rounds twice.
#include "gemma_torch/io/gguf_dequantize.h"

#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

namespace gemma_torch {
namespace {

constexpr int kBlock = 32;        // weights of a block of the older types
constexpr int kSuperBlock = 256;  // weights of a K block

constexpr std::array<GgmlLayout, 11> kLayouts = {{
    {GgmlType::kF32, "F32", 1, 4},
    {GgmlType::kF16, "F16", 1, 2},
    {GgmlType::kBF16, "BF16", 1, 2},
    {GgmlType::kQ4_0, "Q4_0", kBlock, 18},        // d, 16 bytes of two 4-bit weights
    {GgmlType::kQ4_1, "Q4_1", kBlock, 20},        // d, m, 16
    {GgmlType::kQ5_0, "Q5_0", kBlock, 22},        // d, 32 fifth bits, 16
    {GgmlType::kQ5_1, "Q5_1", kBlock, 24},        // d, m, 32 fifth bits, 16
    {GgmlType::kQ8_0, "Q8_0", kBlock, 34},        // d, 32 int8
    {GgmlType::kQ4_K, "Q4_K", kSuperBlock, 144},  // d, dmin, 12 of scales, 128
    {GgmlType::kQ5_K, "Q5_K", kSuperBlock, 176},  // d, dmin, 12 of scales, 32 of fifth bits, 128
    {GgmlType::kQ6_K, "Q6_K", kSuperBlock, 210},  // 128, 64 of upper bit pairs, 16 int8 scales, d
}};

float half_at(const uint8_t* at) {
  uint16_t bits = 0;
  std::memcpy(&bits, at, sizeof(bits));
  return c10::detail::fp16_ieee_to_fp32_value(bits);
}

uint32_t word_at(const uint8_t* at) {
  uint32_t word = 0;
  std::memcpy(&word, at, sizeof(word));
  return word;
}

// Byte j of a 32-block holds weight j in its low and weight j + 16 in its high half.
void q4_0(const uint8_t* b, float* out) {
  const float d = half_at(b);
  for (int j = 0; j < kBlock / 2; ++j) {
    out[j] = d * static_cast<float>((b[2 + j] & 15) - 8);
    out[j + kBlock / 2] = d * static_cast<float>((b[2 + j] >> 4) - 8);
  }
}

void q4_1(const uint8_t* b, float* out) {
  const float d = half_at(b);
  const float m = half_at(b + 2);
  for (int j = 0; j < kBlock / 2; ++j) {
    out[j] = d * static_cast<float>(b[4 + j] & 15) + m;
    out[j + kBlock / 2] = d * static_cast<float>(b[4 + j] >> 4) + m;
  }
}

/// The 32 weights 0..31 of a 5-bit block: low four bits from `low`, bit j of `high` above them.
std::array<int, kBlock> five_bits(const uint8_t* low, uint32_t high) {
  std::array<int, kBlock> q = {};
  for (int j = 0; j < kBlock / 2; ++j) {
    q[j] = (low[j] & 15) | static_cast<int>((high >> j & 1) << 4);
    q[j + kBlock / 2] = (low[j] >> 4) | static_cast<int>((high >> (j + kBlock / 2) & 1) << 4);
  }
  return q;
}

void q5_0(const uint8_t* b, float* out) {
  const float d = half_at(b);
  const auto q = five_bits(b + 6, word_at(b + 2));
  for (int j = 0; j < kBlock; ++j) {
    out[j] = d * static_cast<float>(q[j] - 16);
  }
}

void q5_1(const uint8_t* b, float* out) {
  const float d = half_at(b);
  const float m = half_at(b + 2);
  const auto q = five_bits(b + 8, word_at(b + 4));
  for (int j = 0; j < kBlock; ++j) {
    out[j] = d * static_cast<float>(q[j]) + m;
  }
}

void q8_0(const uint8_t* b, float* out) {
  const float d = half_at(b);
  for (int j = 0; j < kBlock; ++j) {
    out[j] = static_cast<float>(static_cast<int8_t>(b[2 + j])) * d;
  }
}

/// Scale and offset of each of the 8 sub-blocks of 32: 6 bits each in 12 bytes, the upper pairs
/// of 4..7 lent out to the top bits of bytes 0..7.
struct SubBlocks {
  std::array<float, 8> d = {};
  std::array<float, 8> m = {};
};
SubBlocks sub_blocks(const uint8_t* b) {
  const float d = half_at(b);
  const float dmin = half_at(b + 2);
  const uint8_t* s = b + 4;
  SubBlocks sub;
  for (int i = 0; i < 4; ++i) {
    sub.d[i] = d * static_cast<float>(s[i] & 63);
    sub.m[i] = dmin * static_cast<float>(s[i + 4] & 63);
    sub.d[i + 4] = d * static_cast<float>((s[i + 8] & 15) | (s[i] >> 6 << 4));
    sub.m[i + 4] = dmin * static_cast<float>((s[i + 8] >> 4) | (s[i + 4] >> 6 << 4));
  }
  return sub;
}

// Sub-blocks 2i and 2i + 1 lie in the low and the high halves of the same 32 bytes.
void q4_k(const uint8_t* b, float* out) {
  const auto sub = sub_blocks(b);
  for (int i = 0; i < 8; ++i) {
    const uint8_t* low = b + 16 + i / 2 * 32;
    const int shift = i % 2 * 4;
    for (int j = 0; j < 32; ++j) {
      out[i * 32 + j] = sub.d[i] * static_cast<float>(low[j] >> shift & 15) - sub.m[i];
    }
  }
}

void q5_k(const uint8_t* b, float* out) {
  const auto sub = sub_blocks(b);
  const uint8_t* high = b + 16;  // bit i of byte j: the fifth bit of weight j of sub-block i
  for (int i = 0; i < 8; ++i) {
    const uint8_t* low = b + 48 + i / 2 * 32;
    const int shift = i % 2 * 4;
    for (int j = 0; j < 32; ++j) {
      const int q = (low[j] >> shift & 15) | (high[j] >> i & 1) << 4;
      out[i * 32 + j] = sub.d[i] * static_cast<float>(q) - sub.m[i];
    }
  }
}

// Rows of 32 weights: row r of half h takes 64-byte group h of the low bits and bits 2r, 2r + 1 of
// 32-byte group h.
void q6_k(const uint8_t* b, float* out) {
  const uint8_t* scales = b + 192;
  const float d = half_at(b + 208);
  for (int row = 0; row < 8; ++row) {
    const int half = row / 4;
    const uint8_t* low = b + half * 64 + row % 2 * 32;
    const uint8_t* high = b + 128 + half * 32;
    const int low_shift = row % 4 / 2 * 4;
    const int high_shift = row % 4 * 2;
    for (int part = 0; part < 2; ++part) {
      const float scale = d * static_cast<float>(static_cast<int8_t>(scales[row * 2 + part]));
      for (int j = part * 16; j < part * 16 + 16; ++j) {
        const int q = (low[j] >> low_shift & 15) | (high[j] >> high_shift & 3) << 4;
        out[row * 32 + j] = scale * static_cast<float>(q - 32);
      }
    }
  }
}

void f32(const uint8_t* b, float* out) {
  std::memcpy(out, b, sizeof(float));
}
void f16(const uint8_t* b, float* out) {
  *out = half_at(b);
}
void bf16(const uint8_t* b, float* out) {
  *out =
      std::bit_cast<float>(static_cast<uint32_t>(b[0]) << 16 | static_cast<uint32_t>(b[1]) << 24);
}

template <void (*kDequantize)(const uint8_t*, float*), int kBytes, int kValues>
void each_block(const std::byte* data, int64_t blocks, float* out) {
  const auto* at = reinterpret_cast<const uint8_t*>(data);
  for (int64_t i = 0; i < blocks; ++i) {
    kDequantize(at + i * kBytes, out + i * kValues);
  }
}

}  // namespace

const GgmlLayout* find_layout(uint32_t type) {
  const auto* found = std::find_if(kLayouts.begin(), kLayouts.end(), [&](const GgmlLayout& row) {
    return static_cast<uint32_t>(row.type) == type;
  });
  return found == kLayouts.end() ? nullptr : &*found;
}

void dequantize_blocks(GgmlType type, const std::byte* data, int64_t blocks, float* out) {
  switch (type) {
    case GgmlType::kF32:
      return each_block<f32, 4, 1>(data, blocks, out);
    case GgmlType::kF16:
      return each_block<f16, 2, 1>(data, blocks, out);
    case GgmlType::kBF16:
      return each_block<bf16, 2, 1>(data, blocks, out);
    case GgmlType::kQ4_0:
      return each_block<q4_0, 18, kBlock>(data, blocks, out);
    case GgmlType::kQ4_1:
      return each_block<q4_1, 20, kBlock>(data, blocks, out);
    case GgmlType::kQ5_0:
      return each_block<q5_0, 22, kBlock>(data, blocks, out);
    case GgmlType::kQ5_1:
      return each_block<q5_1, 24, kBlock>(data, blocks, out);
    case GgmlType::kQ8_0:
      return each_block<q8_0, 34, kBlock>(data, blocks, out);
    case GgmlType::kQ4_K:
      return each_block<q4_k, 144, kSuperBlock>(data, blocks, out);
    case GgmlType::kQ5_K:
      return each_block<q5_k, 176, kSuperBlock>(data, blocks, out);
    case GgmlType::kQ6_K:
      return each_block<q6_k, 210, kSuperBlock>(data, blocks, out);
  }
}

void round_to_bfloat16(const float* values, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const auto bits = std::bit_cast<uint32_t>(values[i]);
    const bool nan = (bits & 0x7fffffffU) > 0x7f800000U;
    const uint32_t rounded = (bits + 0x7fffU + (bits >> 16 & 1U)) >> 16;
    out[i] = static_cast<uint16_t>(nan ? 0x7fc0U : rounded);
  }
}

}  // namespace gemma_torch
