// What several ranks share, each of which runs all cases: mpirun -np 2 test_ranks.

#include "gemma_torch/adapt/ranks.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <cmath>

#include "gemma_torch/adapt/gradient_exchange.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/training_run.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

// Joined in the first case, left when the program ends.
const Ranks& world() {
  struct Joined {
    Ranks ranks = Ranks::world();
    ~Joined() { ranks.leave(); }
  };
  static const Joined joined;
  return joined.ranks;
}

TrainerOptions options_of(int64_t steps, int64_t accumulate) {
  return {.learning_rate = 1e-2,
          .schedule = Schedule::kConstant,
          .steps = steps,
          .accumulate = accumulate};
}

double distance(const at::Tensor& a, const at::Tensor& b) {
  return ((a - b).norm() / b.norm().clamp_min(1e-30)).item<double>();
}

// Whether all ranks hold the same bits.
bool same_on_all(const at::Tensor& tensor) {
  auto of_rank_0 = tensor.detach().clone();
  world().broadcast(of_rank_0);
  std::vector<double> differing = {at::equal(of_rank_0, tensor) ? 0.0 : 1.0};
  world().sum(differing);
  return differing[0] == 0;
}

}  // namespace

TEST_CASE("ranks add, tell and hear", "[ranks]") {
  const auto& ranks = world();
  REQUIRE(ranks.size() >= 2);
  const auto n = static_cast<double>(ranks.size());
  std::vector<double> values = {1, static_cast<double>(ranks.rank())};
  ranks.sum(values);
  CHECK(values == std::vector<double>{n, n * (n - 1) / 2});
  const auto texts = ranks.gather(std::string(static_cast<size_t>(ranks.rank()), 'x'));
  REQUIRE(std::ssize(texts) == ranks.size());
  CHECK(texts[0].empty());
  CHECK(texts[1] == "x");
  const auto told = at::full({3}, ranks.rank() + 7, at::kLong);
  ranks.broadcast(told);
  CHECK(told[2].item<int64_t>() == 7);
  const auto summed = at::full({5}, static_cast<double>(ranks.rank() + 1), at::kFloat);
  ranks.start_sum(summed).wait();
  CHECK(summed[4].item<double>() == n * (n + 1) / 2);
  CHECK(ranks.all_here(20));
}

TEST_CASE("gradients of every kind are summed, whatever their size", "[ranks]") {
  const auto& ranks = world();
  const auto model = small_models().wide;
  std::vector<TrainedTensor> trained;
  int64_t numbers = 0;
  const auto add = [&](const at::Tensor& parameter) {
    trained.push_back({.name = std::to_string(trained.size()), .parameter = parameter});
    numbers += parameter.numel();
  };
  const auto own = static_cast<double>(ranks.rank() + 1);
  for (auto& parameter : model->blocks->ptr(1)->parameters()) {
    parameter.requires_grad_(true);
    add(parameter);
    parameter.mutable_grad() = at::full_like(parameter.detach(), own);
  }
  const auto large = at::zeros({40 << 20}, at::kBFloat16).requires_grad_(true);  // 40 buckets
  large.mutable_grad() = at::full_like(large.detach(), own);
  add(large);
  const auto absent = at::zeros({3, 2}).requires_grad_(true);
  if (ranks.rank() == 0) {
    absent.mutable_grad() = at::ones({3, 2});
  }
  add(absent);
  auto rows = at::full({2, 4}, own);
  trained.push_back({.name = "rows",
                     .parameter = at::zeros({6, 4}),
                     .rows = at::tensor({1, 4}, at::kLong),
                     .gradient = rows});
  GradientExchange exchange(ranks, model, trained);
  CHECK(exchange.bytes() == 4 * (numbers + 8));
  if (ranks.rank() == 0) {  // the others had no batch
    exchange.block_done(model->cfg.n_layers - 1);
    exchange.block_done(1);
  }
  exchange.finish();
  const auto sum = static_cast<double>(ranks.size() * (ranks.size() + 1)) / 2;
  for (size_t i = 0; i + 2 < trained.size(); ++i) {
    INFO(i);
    const auto gradient = trained[i].parameter.grad().to(at::kFloat);
    CHECK(gradient.min().item<double>() == sum);
    CHECK(gradient.max().item<double>() == sum);
  }
  CHECK(at::equal(absent.grad(), at::ones({3, 2})));
  CHECK(at::equal(rows, at::full({2, 4}, sum)));
}

TEST_CASE("ranks step as one does with as many batches", "[ranks]") {
  const auto& ranks = world();
  // An epoch has five batches, so that steps have some of two. Of more batches a rank the sum has another order, and
  // AdamW magnifies its rounding where a gradient is almost zero.
  const auto [accumulate, tolerance] = GENERATE(std::pair(1, 1e-6), std::pair(2, 1e-4));
  TrainingRun together(options_of(4, accumulate), {.dropout = 0, .ranks = ranks});
  TrainingRun alone(options_of(4, accumulate * ranks.size()), {.dropout = 0});
  for (int step = 0; step < 4; ++step) {
    const auto found = together.trainer->step();
    const auto expected = alone.trainer->step();
    CHECK(found.targets == expected.targets);
    CHECK(found.tokens == expected.tokens);
    CHECK(found.epoch == expected.epoch);
    CHECK(found.loss == Approx(expected.loss).epsilon(tolerance));
    CHECK(found.grad_norm == Approx(expected.grad_norm).epsilon(tolerance));
  }
  const auto expected = alone.adapter->tensors();
  for (const auto& [name, tensor] : together.adapter->tensors()) {
    INFO(name);
    CHECK(distance(tensor, expected.at(name)) < tolerance);
    CHECK(same_on_all(tensor));
  }
  CHECK(together.trainer->exchanged_bytes() > 0);
  CHECK(alone.trainer->exchanged_bytes() == 0);
}

TEST_CASE("a rank without a batch takes part in the last step", "[ranks]") {
  const auto& ranks = world();
  auto options = options_of(5, 1);
  options.epochs = 1;
  options.steps = (5 + ranks.size() - 1) / ranks.size();
  TrainingRun together(options, {.dropout = 0, .ranks = ranks});
  options.accumulate = ranks.size();
  TrainingRun alone(options, {.dropout = 0});
  while (!alone.trainer->done()) {
    CHECK(together.trainer->step().targets == alone.trainer->step().targets);
  }
  const auto expected = alone.adapter->tensors();
  for (const auto& [name, tensor] : together.adapter->tensors()) {
    CHECK(distance(tensor, expected.at(name)) < 1e-6);
  }
}

TEST_CASE("ranks go on from rank 0's state in the same bits", "[ranks]") {
  const auto& ranks = world();
  TrainingRun whole(options_of(5, 1), {.dropout = 0.3, .ranks = ranks});
  for (int step = 0; step < 2; ++step) {
    whole.trainer->step();
  }
  TensorMap kept;
  for (const auto& [name, tensor] : whole.trainer->state()) {
    kept[name] = tensor.clone();
  }
  CHECK(same_on_all(kept.at("random_state")));
  while (!whole.trainer->done()) {
    whole.trainer->step();
  }
  TrainingRun second(options_of(5, 1), {.dropout = 0.3, .ranks = ranks});
  torch::manual_seed(static_cast<uint64_t>(ranks.rank()));
  if (ranks.rank() == 0) {
    second.trainer->load(kept);
  }
  second.trainer->join(ranks);
  CHECK(second.trainer->steps() == 2);
  while (!second.trainer->done()) {
    second.trainer->step();
  }
  const auto expected = whole.adapter->tensors();
  for (const auto& [name, tensor] : second.adapter->tensors()) {
    INFO(name);
    CHECK(at::equal(tensor, expected.at(name)));
    CHECK(same_on_all(tensor));
  }
}

TEST_CASE("each rank has dropout of its own", "[ranks]") {
  const auto& ranks = world();
  const auto loss_of = [](TrainingRun& run, uint64_t seed) {
    const torch::NoGradGuard no_grad;
    for (const auto& parameter : run.adapter->parameters()) {
      parameter.fill_(0.1);  // matrices that are zero would hide it
    }
    torch::manual_seed(seed);
    return run.trainer->step().loss;
  };
  const auto same_lines = id_lines({9}) + id_lines({9}) + id_lines({9}) + id_lines({9});
  TrainingRun together(options_of(1, 1), {.dropout = 0.5, .ranks = ranks, .lines = same_lines});
  const auto found = loss_of(together, 77);
  torch::manual_seed(77);
  const auto seeds = at::randint(int64_t{1} << 32, {ranks.size()}, at::kLong);
  double mean = 0, least = INFINITY, most = 0;
  for (int64_t rank = 0; rank < ranks.size(); ++rank) {
    TrainingRun alone(options_of(1, 1), {.dropout = 0.5, .lines = same_lines});
    const auto loss = loss_of(alone, static_cast<uint64_t>(seeds[rank].item<int64_t>()));
    mean += loss / static_cast<double>(ranks.size());
    least = std::min(least, loss);
    most = std::max(most, loss);
  }
  CHECK(found == Approx(mean).epsilon(1e-6));
  CHECK(most - least > 1e-4 * mean);
}

TEST_CASE("what is no number on one rank stops all, and names its lines", "[ranks]") {
  const auto& ranks = world();
  TrainingRun run(options_of(3, 1), {.dropout = 0, .ranks = ranks});
  run.trainer->step();
  const auto upcoming = run.batches.upcoming();
  const auto before = run.adapter->parameters()[0].detach().clone();
  if (ranks.rank() == 1) {
    const torch::NoGradGuard no_grad;
    run.adapter->parameters()[3].fill_(NAN);
  }
  const auto message = error_of([&] { run.trainer->step(); });
  CHECK_THAT(message, Catch::Contains("[trainer] step 2: loss: expected a finite number, got nan"));
  // Its lines are those of the batch of rank 1.
  Batches again(run.data, run.batches.options());
  again.seek(run.batches.position());
  std::string lines;
  if (ranks.rank() == 1) {
    Batches own(run.data, {.rows = 2, .seed = 3});
    own.seek(upcoming);
    for (const auto example : own.next().examples) {
      lines += (lines.empty() ? "" : ", ") + std::to_string(run.data.line(example));
    }
  }
  lines = ranks.gather(lines)[1];
  CHECK_THAT(message, Catch::Contains("(lines " + lines + " of"));
  CHECK(at::equal(run.adapter->parameters()[0], before));
}
