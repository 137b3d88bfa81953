#include "gemma_torch/kernels/cpu/isa.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace gemma_torch::kernels {
namespace {

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512bf16");
}

// Tiles are the one register set that Linux hands out on request only: 8 KiB more to save at each switch of threads.
bool asks_for_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return ::syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  unsigned int a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) {
    return false;
  }
  constexpr unsigned int kAmxBf16 = 1U << 22, kAmxTile = 1U << 24;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) {
    return false;
  }
  static const bool granted = asks_for_tiles();
  return granted;
}
#endif

StreamAhead choose_stream_ahead() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // static objects may come before it has been
  if (__builtin_cpu_is("amd")) {
    return {0, 0};
  }
#endif
  return {1024, 8192};
}

}  // namespace

const StreamAhead stream_ahead = choose_stream_ahead();

bool has_isa(Isa isa) {
  switch (isa) {
    case Isa::kGeneric:
      return true;
#if defined(__x86_64__)
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return has_avx512();
    case Isa::kAmx:
      return has_amx();
#elif defined(__aarch64__) && defined(__linux__)
    case Isa::kNeon:
      return (::getauxval(AT_HWCAP) & (1UL << 20)) != 0;  // HWCAP_ASIMDDP: dot products
#elif defined(__aarch64__)
    case Isa::kNeon:
      return true;  // every Apple chip since the A13
#endif
    default:
      return false;
  }
}

std::vector<Isa> usable_isas() {
  std::vector<Isa> usable;
  for (const auto isa : {Isa::kGeneric, Isa::kNeon, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
    if (has_isa(isa)) {
      usable.push_back(isa);
    }
  }
  return usable;
}

Isa best_isa() {
  static const Isa best = usable_isas().back();
  return best;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kNeon:
      return "neon";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAmx:
      return "amx";
    default:
      return "generic";
  }
}

}  // namespace gemma_torch::kernels
