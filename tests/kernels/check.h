#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "gemma_torch/kernels/cpu/fused_kernels.h"

namespace gemma_torch::kernels::test {

/// Pseudo-random numbers, the same on every machine (SplitMix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits();
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  float uniform();  // [-1, 1)
  float normal();
  std::vector<float> normals(int64_t n, float scale = 1);

 private:
  uint64_t state_;
};

/// What one line of the report stands for: a behaviour, over many comparisons.
class Check {
 public:
  /// |got - want| <= tolerance; NaN is never near anything.
  void near(double got, double want, double tolerance);
  void that(bool ok) { near(ok ? 0 : 1, 0, 0); }
  /// Equal bit for bit.
  template <typename T>
  void same(const T& got, const T& want) {
    that(std::memcmp(&got, &want, sizeof(T)) == 0);
  }
  template <typename T>
  void same(const std::vector<T>& got, const std::vector<T>& want) {
    that(got.size() == want.size() &&
         (got.empty() || std::memcmp(got.data(), want.data(), got.size() * sizeof(T)) == 0));
  }

  int64_t compared() const { return compared_; }
  int64_t failed() const { return failed_; }
  /// The largest |got - want| / tolerance.
  double worst() const { return worst_; }
  const std::string& first_failure() const { return first_failure_; }

 private:
  int64_t compared_ = 0;
  int64_t failed_ = 0;
  double worst_ = 0;
  std::string first_failure_;
};

/// Runs checks, prints a line for each, and counts. A check that compares nothing has failed.
class Report {
 public:
  void check(const std::string& name, const std::function<void(Check&)>& body);
  /// Prints the summary; whether all was well.
  bool finish() const;

 private:
  int checks_ = 0;
  int failed_ = 0;
};

/// The kernels under test, those they are compared with, and how much to try.
struct Subject {
  const FusedKernels& kernels;
  const FusedKernels& generic;
  bool small;  // sizes for an emulated CPU
  Report& report;

  std::string name(const std::string& what) const {
    return std::string(isa_name(kernels.isa)) + " " + what;
  }
};

// A float32 sum of n products, in any order that kernels use here, is off by far less than this
// times the sum of the products' sizes; a single wrong bit in one of up to some 4,000 weights is
// more.
constexpr double kSum = 1e-6;

// A number of either type as float64, and the nearest one of a type.
inline double value(float x) {
  return x;
}
inline double value(Bf16 x) {
  return to_float(x);
}
template <typename T>
T narrow(double x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return static_cast<float>(x);
  } else {
    return to_bf16(static_cast<float>(x));
  }
}

void check_products(const Subject& s);
void check_panels(const Subject& s);
void check_gemm(const Subject& s);
void check_rows(const Subject& s);
void check_training(const Subject& s);
void check_training_head(const Subject& s);
void check_training_adamw(const Subject& s);
void check_attention(const Subject& s);
void check_tiles(const Subject& s);
void check_head(const Subject& s);
void check_packed(Report& report);
void check_team(Report& report, bool small);

}  // namespace gemma_torch::kernels::test
