#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace gemma_torch::kernels {

/// Instruction sets that kernels exist for, the narrower ones first. kAvx512 means F, BW, VL, DQ, VNNI, VBMI and BF16
/// (Zen 4, Sapphire Rapids and newer); kAmx adds tiles of bfloat16; kNeon is AArch64 with dot products.
enum class Isa { kGeneric, kNeon, kAvx2, kAvx512, kAmx };

/// Whether this build has kernels for it and this CPU (and its system) runs them.
bool has_isa(Isa isa);

/// The widest that has_isa.
Isa best_isa();

/// All that has_isa, narrowest first.
std::vector<Isa> usable_isas();

/// How many bytes ahead of what they read kernels ask for a stream of weights: soon needed, and later. On Sapphire Rapids
/// that gains 15 to 25 %. The hardware of AMD's Zen 4 does better alone (one thread reads 32 GB/s instead of 17 to 22):
/// there both are 0, and nothing is asked for.
struct StreamAhead {
  int64_t soon, later;
};
extern const StreamAhead stream_ahead;

const char* isa_name(Isa isa);  // "generic", "neon", "avx2", "avx512", "amx"

}  // namespace gemma_torch::kernels
