// The pass made for training against the modules' own forward and autograd.

#include <ATen/Functions.h>

#include "gemma_torch/adapt/lora.h"
#include "gemma_torch/adapt/trained_set.h"
#include "gemma_torch/adapt/training_pass.h"
#include "gemma_torch/quant/packed_linear.h"
#include "gemma_torch/quant/quantize.h"
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

// A float32 model over int8 codes, and one of the weights that they stand for.
std::pair<Gemma3Model, Gemma3Model> coded_models() {
  auto rounded = small_models().rounded;
  quantize(rounded, *find_recipe("int8"), /*calibration=*/nullptr);
  std::vector<std::shared_ptr<PackedLinearImpl>> codes;
  rounded->for_each_linear([&](auto&, const std::string& name, Linear& linear) {
    if (name != "out_head") {
      codes.push_back(std::dynamic_pointer_cast<PackedLinearImpl>(linear.ptr()));
    }
  });
  auto coded = small_models().wide, unpacked = small_models().wide;
  const torch::NoGradGuard no_grad;
  size_t next = 0;
  unpacked->for_each_linear([&](auto&, const std::string& name, Linear& linear) {
    if (name != "out_head") {
      linear->weight.copy_(codes.at(next++)->unpacked());
    }
  });
  next = 0;
  coded->for_each_linear([&](auto& owner, const std::string& name, Linear& linear) {
    if (name != "out_head") {
      replace_linear(owner, name, linear, codes.at(next++));
    }
  });
  return {coded, unpacked};
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

TEST_CASE("rows of the embedding get the gradient that they have in the whole", "[training]") {
  const bool narrow = GENERATE(false, true);
  auto model = narrow ? small_models().rounded : small_models().wide;
  require_gradients(model, true);
  const auto batch = packed_batch();
  TrainingPass whole(model);
  const auto loss = whole.backward(batch, 0.25);
  auto expected = take_gradients(model);
  const auto all = expected.at("tok_emb.weight").to(at::kFloat);
  expected.erase("tok_emb.weight");

  model->tok_emb->weight.requires_grad_(false);
  // Ids that are read, ids that are predicted, ids that are neither, in no order; id 5 is left out.
  const auto rows = at::tensor({1000, 116, 42, 3, 264, 700}, at::kLong);
  const auto gradient = at::zeros({rows.size(0), 128}, at::kFloat);
  TrainingPass pass(model);
  pass.limit_embedding(rows, gradient);
  CHECK(pass.backward(batch, 0.25) == loss);  // the softmax is over all of them
  CHECK_FALSE(model->tok_emb->weight.grad().defined());
  const auto wanted = all.index_select(0, rows);
  CHECK(wanted.norm(2, 1).min().item<double>() > 0);  // by the softmax alone, if by nothing else
  const auto off = (gradient - wanted).norm() / wanted.norm();
  CHECK(off.item<double>() < (narrow ? 1e-2 : 1e-6));
  check_equal(take_gradients(model), expected, 1e-6);

  pass.backward(batch, 0.25);  // added to what is there
  CHECK(((gradient - 2 * wanted).norm() / wanted.norm()).item<double>() < (narrow ? 2e-2 : 2e-6));
  take_gradients(model);
}

TEST_CASE("an adapter over codes has the gradients it has over what they stand for", "[training]") {
  const auto [coded, unpacked] = coded_models();
  const bool recompute = GENERATE(false, true);
  std::vector<std::vector<at::Tensor>> gradients;
  for (const auto& model : {coded, unpacked}) {
    torch::manual_seed(4);
    Adapter adapter(model, {.rank = 4});
    const auto trained = train_adapter(model, adapter, /*narrow=*/false);
    adapter.attach();
    for (const auto& tensor : trained) {
      const torch::NoGradGuard no_grad;
      tensor.parameter.detach().normal_(0, 0.1);
    }
    TrainingPass pass(model, {.recompute = recompute});
    pass.backward(packed_batch(), 0.25);
    auto& found = gradients.emplace_back();
    for (const auto& tensor : trained) {
      found.push_back(tensor.parameter.grad());
    }
    adapter.detach();
  }
  REQUIRE(gradients[0].size() == 4 * 7 * 2);
  for (size_t i = 0; i < gradients[0].size(); ++i) {
    const auto off = (gradients[0][i] - gradients[1][i]).norm() / gradients[1][i].norm();
    CHECK(off.item<double>() < 1e-5);
  }
}
