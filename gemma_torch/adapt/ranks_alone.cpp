// What stands for ranks_mpi.cpp in a build without MPI.
#include "gemma_torch/adapt/ranks.h"

#include "gemma_torch/base/error.h"

namespace gemma_torch {

struct PendingSum::Request {};
struct Ranks::Meeting {};

bool PendingSum::done() {
  return true;
}
void PendingSum::wait() {}

Ranks Ranks::world() {
  fail(
      "[ranks] expected a build with MPI, got one without. Hint: install one (Debian and Ubuntu: "
      "apt-get install libopenmpi-dev openmpi-bin) and configure again with -D GEMMA_TORCH_MPI=ON");
}

void Ranks::leave() const {}
void Ranks::sum(std::vector<double>& /*values*/) const {}
PendingSum Ranks::start_sum(const at::Tensor& /*values*/) const {
  return {};
}
void Ranks::broadcast(const at::Tensor& /*tensor*/) const {}
std::vector<std::string> Ranks::gather(const std::string& own) const {
  return {own};
}
bool Ranks::all_here(double /*seconds*/) const {
  return true;
}

}  // namespace gemma_torch
