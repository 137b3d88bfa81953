#pragma once

#include <c10/core/ScalarType.h>

#include <array>
#include <bit>
#include <cstdint>
#include <string>

#include "gemma_torch/base/error.h"
#include "gemma_torch/io/file_bytes.h"

// What the reader and the writer of safetensors files share.

namespace gemma_torch::safetensors {

static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian");

inline constexpr uint64_t kMaxHeader = 100'000'000;  // bytes; the reference implementation's limit
inline constexpr auto kMetadataKey = "__metadata__";

struct DtypeName {
  const char* name;
  at::ScalarType dtype;
};
inline constexpr std::array<DtypeName, 15> kDtypes = {{{"F64", at::kDouble},
                                                       {"F32", at::kFloat},
                                                       {"F16", at::kHalf},
                                                       {"BF16", at::kBFloat16},
                                                       {"I64", at::kLong},
                                                       {"I32", at::kInt},
                                                       {"I16", at::kShort},
                                                       {"I8", at::kChar},
                                                       {"U64", at::kUInt64},
                                                       {"U32", at::kUInt32},
                                                       {"U16", at::kUInt16},
                                                       {"U8", at::kByte},
                                                       {"BOOL", at::kBool},
                                                       {"F8_E4M3", at::kFloat8_e4m3fn},
                                                       {"F8_E5M2", at::kFloat8_e5m2}}};

/// "embed.weight (model.safetensors)": where an error is.
inline std::string place(const std::string& name, const std::string& file) {
  return fmt::format("{} ({})", printable(name), file);
}

}  // namespace gemma_torch::safetensors
