// The pass made for training against the modules' own forward and autograd.

#include <ATen/Functions.h>

#include "gemma_torch/adapt/cross_entropy.h"
#include "gemma_torch/adapt/lora.h"
#include "gemma_torch/adapt/training_ops.h"
#include "gemma_torch/adapt/training_pass.h"
#include "support/catch.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

// Two rows of which the second is shorter, scored in places.
TrainingBatch small_batch() {
  TrainingBatch batch;
  batch.ids = at::zeros({2, 21}, at::kLong);
  const auto prompt = at::tensor(small_prompt(40));
  batch.ids[0].copy_(prompt.narrow(0, 0, 21));
  batch.ids[1].narrow(0, 0, 13).copy_(prompt.narrow(0, 21, 13));
  batch.scored = at::tensor({4, 5, 6, 19, 21, 30, 32}, at::kLong);
  batch.targets = batch.ids.flatten().index_select(0, batch.scored + 1);
  return batch;
}

// Two examples in each row: columns 0 .. 8 and 9 .. 20.
TrainingBatch packed_batch() {
  auto batch = small_batch();
  batch.first = at::zeros({2, 21}, at::kLong);
  batch.first.narrow(1, 9, 12).fill_(9);
  return batch;
}

// What autograd makes of the modules' own forward: the oracle.
double autograd_loss(const Gemma3Model& given, const TrainingBatch& batch, double factor) {
  auto model = given;
  const auto at = training_placement(batch.ids, batch.first);
  const auto h = model->hidden(batch.ids, at, /*cache=*/nullptr);
  const auto logits = model->out_head(h).flatten(0, 1).index_select(0, batch.scored);
  const auto log_p = logits.to(at::kFloat).log_softmax(1);
  const auto loss = -log_p.gather(1, batch.targets.unsqueeze(1)).sum();
  (loss * factor).backward();
  return loss.item<double>();
}

using Gradients = std::map<std::string, at::Tensor>;

Gradients take_gradients(const Gemma3Model& model) {
  Gradients found;
  for (const auto& item : model->named_parameters()) {
    auto& gradient = item.value().mutable_grad();
    if (gradient.defined()) {
      found[item.key()] = gradient.clone();
    }
    gradient.reset();
  }
  return found;
}

// The largest difference over all tensors, relative to the tensor's own size.
void check_equal(const Gradients& found, const Gradients& expected, double tolerance) {
  REQUIRE(found.size() == expected.size());
  for (const auto& [name, gradient] : expected) {
    INFO(name);
    REQUIRE(found.contains(name));
    const auto difference = (found.at(name) - gradient).to(at::kFloat).norm().item<double>();
    CHECK(difference <= tolerance * gradient.to(at::kFloat).norm().item<double>() + 1e-12);
  }
}

void require_gradients(const Gemma3Model& model, bool value) {
  for (auto& parameter : model->parameters()) {
    parameter.requires_grad_(value);
  }
}

}  // namespace

TEST_CASE("gradients of every parameter equal autograd's", "[training]") {
  auto model = small_models().wide;
  require_gradients(model, true);
  const bool recompute = GENERATE(false, true);
  for (const auto& batch : {small_batch(), packed_batch()}) {
    const auto expected_loss = autograd_loss(model, batch, 0.25);
    const auto expected = take_gradients(model);
    for (const bool written_out : {false, true}) {
      TrainingPass pass(model, {.recompute = recompute, .written_out = written_out});
      const auto loss = pass.backward(batch, 0.25);
      CHECK(std::abs(loss - expected_loss) < 1e-5 * expected_loss);
      CHECK(std::abs(pass.losses(batch).sum().item<double>() - loss) < 1e-6 * loss);
      check_equal(take_gradients(model), expected, 1e-5);
    }
  }
}
