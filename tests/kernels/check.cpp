#include "check.h"

#include <cstdio>

namespace gemma_torch::kernels::test {

uint64_t Random::bits() {
  state_ += 0x9e3779b97f4a7c15U;
  uint64_t z = state_;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
  return z ^ (z >> 31);
}

float Random::uniform() {
  return static_cast<float>(static_cast<double>(bits() >> 40) / (1 << 23) - 1.0);
}

float Random::normal() {
  double sum = 0;  // of twelve uniforms: variance 4
  for (int i = 0; i < 12; ++i) {
    sum += static_cast<double>(uniform());
  }
  return static_cast<float>(sum / 2);
}

std::vector<float> Random::normals(int64_t n, float scale) {
  std::vector<float> x(static_cast<size_t>(n));
  for (auto& value : x) {
    value = normal() * scale;
  }
  return x;
}

void Check::near(double got, double want, double tolerance) {
  ++compared_;
  const double error = std::fabs(got - want);
  if (tolerance > 0 && error / tolerance > worst_) {
    worst_ = error / tolerance;
  }
  if (!(got == want || error <= tolerance)) {
    if (++failed_ == 1) {
      char text[120];
      std::snprintf(text,
                    sizeof text,
                    "got %.9g, want %.9g within %.3g (comparison %lld)",
                    got,
                    want,
                    tolerance,
                    static_cast<long long>(compared_));
      first_failure_ = text;
    }
  }
}

void Report::check(const std::string& name, const std::function<void(Check&)>& body) {
  Check check;
  body(check);
  const bool ok = check.failed() == 0 && check.compared() > 0;
  ++checks_;
  failed_ += ok ? 0 : 1;
  std::printf("%s  %-64s %9lld compared",
              ok ? "ok  " : "FAIL",
              name.c_str(),
              static_cast<long long>(check.compared()));
  if (check.worst() > 0) {
    std::printf(", worst error %.2f of what is allowed", check.worst());
  }
  if (!ok) {
    std::printf(
        ", %lld failed: %s", static_cast<long long>(check.failed()), check.first_failure().c_str());
  }
  std::printf("\n");
  std::fflush(stdout);
}

bool Report::finish() const {
  std::printf("%d of %d checks passed\n", checks_ - failed_, checks_);
  return failed_ == 0 && checks_ > 0;
}

}  // namespace gemma_torch::kernels::test
