// kernels_check [--small] [isa ..]: every kernel of the fused engine and of training, on every
// instruction set of this machine or on those named, against the generic kernels and against plain
// sums in float64; the encoder of lossless cells; and the team of threads. Exit code 1 if a check
// fails, 2 if an instruction set is not there.

#include <algorithm>
#include <cstdio>
#include <string>

#include "check.h"

using namespace gemma_torch::kernels;
using namespace gemma_torch::kernels::test;

namespace {

void check_all(const Subject& s) {
  s.report.check(s.name("is what was asked for"), [&](Check& check) {
    check.that(&s.kernels == &fused_kernels(s.kernels.isa) && has_isa(s.kernels.isa));
  });
  check_products(s);
  check_rows(s);
  check_training(s);
  check_training_head(s);
  check_training_adamw(s);
  check_attention(s);
  check_head(s);
  check_panels(s);
  check_gemm(s);
  check_tiles(s);
}

}  // namespace

int main(int argc, char** argv) {
  bool small = false;
  std::vector<Isa> wanted;
  const auto usable = usable_isas();
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--small") {
      small = true;
      continue;
    }
    const auto found = std::find_if(
        usable.begin(), usable.end(), [&](Isa isa) { return argument == isa_name(isa); });
    if (found == usable.end()) {
      std::fprintf(stderr, "kernels_check: this build or CPU has no %s\n", argument.c_str());
      return 2;
    }
    wanted.push_back(*found);
  }
  Report report;
  for (const auto isa : wanted.empty() ? usable : wanted) {
    const auto& kernels = fused_kernels(isa);
    if (kernels.isa != isa) {
      std::fprintf(stderr,
                   "kernels_check: %s has the kernels of %s\n",
                   isa_name(isa),
                   isa_name(kernels.isa));
      return 1;
    }
    check_all({kernels, fused_kernels(Isa::kGeneric), small, report});
  }
  check_packed(report);
  check_team(report, small);
  return report.finish() ? 0 : 1;
}
