// Uses the installed library as another project would, and shows that c10 still throws where it checks: with
// sentencepiece in the same program, a failed check aborts or hangs unless minloglevel.cpp was linked in.
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <c10/util/Logging.h>

#include <cstdio>
#include <functional>

#include "gemma_torch/base/error.h"
#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/text/tokenizer.h"

namespace {

template <typename Exception>
bool throws(const char* what, const std::function<void()>& action) {
  try {
    action();
  } catch (const Exception&) {
    return true;
  }
  std::printf("%s: expected an exception, got none\n", what);
  return false;
}

}  // namespace

int main() {
  if (!throws<gemma_torch::Error>("Tokenizer", [] { gemma_torch::Tokenizer({}); })) return 1;

  const gemma_torch::TensorMap tensors = {{"a", at::arange(3)}};
  if (tensors.at("a").sum().item<int64_t>() != 3) return 1;

  const bool ok =
      throws<gemma_torch::Error>("check", [] { gemma_torch::check(false, "[consumer] {}", 1); }) &&
      throws<c10::Error>("CAFFE_ENFORCE", [] { CAFFE_ENFORCE(false, "refused"); }) &&
      throws<c10::Error>("at::empty", [] { at::empty({int64_t{1} << 60}, at::kFloat); });
  return ok ? 0 : 1;
}
