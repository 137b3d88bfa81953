#include "gemma_torch/adapt/trainer.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/optim/adamw.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "gemma_torch/adapt/checkpoint.h"
#include "gemma_torch/adapt/cross_entropy.h"
#include "gemma_torch/adapt/rounded_adamw.h"
#include "gemma_torch/adapt/sparse_embedding.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/scratch.h"
#include "support/training_run.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

constexpr TrainerOptions kOptions = {
    .learning_rate = 1e-2, .warmup = 2, .steps = 8, .accumulate = 2};

void check_same_bits(const TensorMap& found, const TensorMap& expected) {
  REQUIRE(found.size() == expected.size());
  for (const auto& [name, tensor] : expected) {
    INFO(name);
    CHECK(at::equal(found.at(name), tensor));
  }
}

}  // namespace

TEST_CASE("AdamW steps as torch::optim::AdamW does", "[training]") {
  torch::manual_seed(1);
  const auto dtype = GENERATE(at::kFloat, at::kBFloat16);
  auto ours = at::randn({7, 5}).to(dtype).requires_grad_();
  auto norm = at::randn({5}).to(dtype).requires_grad_();
  auto theirs = ours.detach().to(at::kFloat).requires_grad_();
  auto their_norm = norm.detach().to(at::kFloat).requires_grad_();
  AdamW optimizer(
      {{.name = "w", .parameter = ours}, {.name = "n", .parameter = norm, .decays = false}},
      {.weight_decay = 0.1});
  torch::optim::AdamW decayed({theirs}, torch::optim::AdamWOptions(0.01).weight_decay(0.1));
  torch::optim::AdamW plain({their_norm}, torch::optim::AdamWOptions(0.01).weight_decay(0));
  for (int step = 0; step < 5; ++step) {
    ours.mutable_grad() = at::randn({7, 5}).to(dtype);
    norm.mutable_grad() = at::randn({5}).to(dtype);
    theirs.mutable_grad() = ours.grad().to(at::kFloat) * 0.5;
    their_norm.mutable_grad() = norm.grad().to(at::kFloat) * 0.5;
    optimizer.step(0.01, 0.5);
    decayed.step();
    plain.step();
    CHECK_FALSE(ours.grad().defined());
  }
  const auto state = optimizer.state();
  CHECK((state.at("w") - theirs).abs().max().item<double>() < 1e-6);
  CHECK((state.at("n") - their_norm).abs().max().item<double>() < 1e-6);
  CHECK(at::equal(ours, state.at("w").to(dtype)));
}

TEST_CASE("AdamW without masters follows AdamW with them", "[training]") {
  torch::manual_seed(1);
  auto narrow = at::randn({300, 200}).to(at::kBFloat16), wide = narrow.clone();
  const auto begin = narrow.clone();
  AdamW rounded({{.name = "w", .parameter = narrow}}, {.state = at::kBFloat16});
  AdamW exact({{.name = "w", .parameter = wide}}, {});
  const auto slope = at::randn({300, 200}).to(at::kBFloat16);
  for (int step = 0; step < 200; ++step) {
    narrow.mutable_grad() = (slope + at::randn({300, 200}) * 0.1).to(at::kBFloat16);
    wide.mutable_grad() = narrow.grad().clone();
    rounded.step(1e-4, 0.5);
    exact.step(1e-4, 0.5);
  }
  // A step moves few of these weights by half of what separates two bfloat16 numbers; in the mean all go the way.
  const auto master = exact.state().at("w");
  const auto moved = master - begin.to(at::kFloat), off = narrow.to(at::kFloat) - master;
  CHECK(std::abs((off * moved.sign()).mean().item<double>()) <
        0.01 * moved.abs().mean().item<double>());
  CHECK(off.abs().mean().item<double>() < 0.5 * moved.abs().mean().item<double>());
  CHECK(rounded.state().at("w").is_alias_of(narrow));
  CHECK(rounded.state().at("w.exp_avg_sq").scalar_type() == at::kBFloat16);
  const auto square = exact.state().at("w.exp_avg_sq").mean().item<double>();
  CHECK(rounded.state().at("w.exp_avg_sq").mean(at::kFloat).item<double>() ==
        Approx(square).epsilon(0.01));
  auto single = at::zeros({2});
  CHECK(error_of([&] { AdamW({{.name = "x", .parameter = single}}, {.state = at::kBFloat16}); }) ==
        "[adamw] x: expected bfloat16, as the state is to be, got Float");
}

TEST_CASE("a rounded step is the same on any threads, and written out", "[training]") {
  torch::manual_seed(2);
  const auto type = GENERATE(at::kFloat, at::kBFloat16);
  const int64_t n = 5'000'001;  // more than are widened at a time
  const auto draw = [&] { return at::randn({n}).to(at::kBFloat16); };
  const RoundedTensors first = {draw(), draw(), draw().square(), at::randn({n}).to(type)};
  const auto copy = [&] {
    return RoundedTensors{
        first.parameter.clone(), first.exp_avg.clone(), first.exp_avg_sq.clone(), first.gradient};
  };
  const RoundedStep step = {.learning_rate = 0.01,
                            .beta1 = 0.9,
                            .beta2 = 0.999,
                            .eps = 1e-8,
                            .weight_decay = 0.1,
                            .factor = 0.5,
                            .step = 3,
                            .stream = 1};
  const auto many = copy(), one = copy(), written = copy();
  step_rounded(many, step);
  {
    const auto threads = at::get_num_threads();
    at::set_num_threads(1);
    step_rounded(one, step);
    at::set_num_threads(threads);
  }
  step_rounded_written_out(written, step);
  for (const auto part :
       {&RoundedTensors::parameter, &RoundedTensors::exp_avg, &RoundedTensors::exp_avg_sq}) {
    CHECK(at::equal(many.*part, one.*part));
    CHECK_FALSE(at::equal(many.*part, first.*part));
    // float32 roundings differ: now and then the carry does too.
    const auto differ = (many.*part).ne(written.*part).to(at::kDouble).mean().item<double>();
    CHECK(differ < 1e-3);
  }
}

TEST_CASE("rows of a parameter are stepped alone", "[training]") {
  auto weight = at::randn({6, 4}).to(at::kBFloat16);
  const auto before = weight.clone();
  auto gradient = at::ones({2, 4});
  AdamW optimizer({{.name = "w",
                    .parameter = weight,
                    .rows = at::tensor({1, 4}, at::kLong),
                    .gradient = gradient}},
                  {});
  optimizer.step(0.5);
  CHECK((weight - before)[1].abs().min().item<double>() > 0.4);
  CHECK((weight - before)[4].abs().min().item<double>() > 0.4);
  for (const int64_t row : {0, 2, 3, 5}) {
    CHECK(at::equal(weight[row], before[row]));
  }
  CHECK(gradient.abs().max().item<double>() == 0);
}

TEST_CASE("schedules are those of transformers", "[training]") {
  // get_linear_schedule_with_warmup and get_cosine_schedule_with_warmup of 4 warm-up steps of 20.
  CHECK(schedule_factor(Schedule::kConstant, 1, 4, 20) == Approx(0.25));
  CHECK(schedule_factor(Schedule::kConstant, 19, 4, 20) == Approx(1.0));
  CHECK(schedule_factor(Schedule::kLinear, 4, 4, 20) == Approx(1.0));
  CHECK(schedule_factor(Schedule::kLinear, 12, 4, 20) == Approx(0.5));
  CHECK(schedule_factor(Schedule::kCosine, 8, 4, 20) == Approx(0.8535533906));
  CHECK(schedule_factor(Schedule::kCosine, 20, 4, 20) == Approx(0.0).margin(1e-12));
}

TEST_CASE("cross-entropy and its gradients are PyTorch's, in pieces too", "[training]") {
  torch::manual_seed(2);
  const auto [rows, vocabulary] =
      GENERATE(std::pair<int64_t, int64_t>{9, 50}, std::pair<int64_t, int64_t>{130, 262'144});
  const auto hidden = at::randn({rows, 8}).requires_grad_();
  const auto weight = at::randn({vocabulary, 8}).requires_grad_();
  const auto targets = at::randint(vocabulary, {rows});
  const auto losses = at::cross_entropy_loss(
      hidden.matmul(weight.t()), targets, /*weight=*/{}, at::Reduction::None);
  (losses.sum() * 0.5).backward();
  auto all = at::zeros_like(weight);
  const auto found = cross_entropy(hidden, weight, targets, 0.5, {{}, all});
  const auto wanted = at::tensor({3, 17, 49}, at::kLong);
  auto some = at::zeros({3, 8});
  cross_entropy(hidden, weight, targets, 0.5, {wanted, some});
  const auto off = [](const at::Tensor& a, const at::Tensor& b) {
    return (a - b).abs().max().item<double>() / b.abs().max().item<double>();
  };
  CHECK(off(cross_entropy_loss(hidden, weight, targets), losses) < 1e-5);
  CHECK(std::abs(found.loss - losses.sum().item<double>()) < 1e-4 * found.loss);
  CHECK(off(found.hidden, hidden.grad()) < 1e-4);
  CHECK(off(all, weight.grad()) < 1e-4);
  CHECK(off(some, weight.grad().index_select(0, wanted)) < 1e-4);
  CHECK(
      error_of(
          [&] { cross_entropy(hidden, weight, at::full({rows}, vocabulary, at::kLong), 1); }) ==
      fmt::format("[cross_entropy] targets: expected 0 .. {}, got {}", vocabulary - 1, vocabulary));
}

TEST_CASE("a bfloat16 head's gradient is that of its logits, of few tokens that matter or of all",
          "[training]") {
  torch::manual_seed(5);
  const double spread = GENERATE(3.0, 0.01);  // peaks, and rows where every token matters
  const int64_t rows = 300, vocabulary = GENERATE(5003, 262'144), columns = 72;
  const auto hidden = (at::randn({rows, columns}) * spread).to(at::kBFloat16);
  const auto weight = at::randn({vocabulary, columns}).to(at::kBFloat16);
  auto targets = at::randint(vocabulary, {rows});
  const auto logits = hidden.matmul(weight.t()).to(at::kDouble).requires_grad_();
  targets.slice(0, 0, rows / 2).copy_(logits.argmax(1).slice(0, 0, rows / 2));
  const auto losses = at::cross_entropy_loss(logits, targets, /*weight=*/{}, at::Reduction::None);
  (losses.sum() * 0.5).backward();
  const auto want = logits.grad().matmul(weight.to(at::kDouble));
  const auto found = cross_entropy(hidden, weight, targets, 0.5);
  CHECK(std::abs(found.loss - losses.sum().item<double>()) < 1e-6 * found.loss);
  CHECK((found.hidden - want).norm().item<double>() < 0x1p-8 * want.norm().item<double>());
  auto both = at::zeros_like(weight);  // the weight's gradient beside it changes nothing
  CHECK(at::equal(cross_entropy(hidden, weight, targets, 0.5, {{}, both}).hidden, found.hidden));
  const auto all = logits.grad().t().matmul(hidden.to(at::kDouble));
  CHECK((both - all).norm().item<double>() < 0x1p-7 * all.norm().item<double>());
}

TEST_CASE("a run that is cut and goes on ends in the same bits", "[training]") {
  const bool recompute = GENERATE(false, true);
  TrainingRun whole(kOptions, {.recompute = recompute});
  while (!whole.trainer->done()) {
    whole.trainer->step();
  }
  TrainingRun first(kOptions, {.recompute = recompute});
  for (int step = 0; step < 3; ++step) {
    first.trainer->step();
  }
  const ScratchFolder folder("gemma_checkpoints");
  const auto path = folder.path().string();
  Checkpoints(path).save(*first.trainer, {{"note", 1}});
  TrainingRun second(kOptions, {.recompute = recompute});
  torch::manual_seed(99);
  Checkpoints(path).load(3, *second.trainer);
  while (!second.trainer->done()) {
    second.trainer->step();
  }
  check_same_bits(second.trainer->state(), whole.trainer->state());
}

TEST_CASE("blocks that are run again draw the same dropout", "[training]") {
  TrainingRun plain(kOptions), again(kOptions, {.recompute = true});
  for (int step = 0; step < 3; ++step) {
    for (auto* run : {&plain, &again}) {
      torch::manual_seed(step);  // both draw from one generator
      run->trainer->step();
    }
  }
  check_same_bits(again.adapter->tensors(), plain.adapter->tensors());
}

TEST_CASE("a step learns, and reports what it did", "[training]") {
  auto options = kOptions;
  options.steps = 40;
  TrainingRun run(options);
  const auto first = run.trainer->step();
  CHECK(first.step == 1);
  CHECK(first.learning_rate == 0);
  CHECK(first.targets == 4);
  auto last = first;
  while (!run.trainer->done()) {
    last = run.trainer->step();
  }
  CHECK(last.loss < first.loss - 1);
  Batches held(run.data, {.rows = 4, .shuffle = false});
  const auto once = evaluate(run.model, run.pass, held);
  CHECK(evaluate(run.model, run.pass, held).loss == once.loss);  // no dropout, from the start
  CHECK(once.targets == run.data.targets());
}

TEST_CASE("what is no number stops training before a parameter changes", "[training]") {
  TrainingRun run(kOptions);
  run.trainer->step();
  const auto before = run.adapter->parameters()[0].detach().clone();
  {
    const torch::NoGradGuard no_grad;
    run.adapter->parameters()[3].fill_(NAN);
  }
  const auto message = error_of([&] { run.trainer->step(); });
  CHECK_THAT(message, Catch::Contains("[trainer] step 2: loss: expected a finite number, got nan"));
  CHECK_THAT(message, Catch::Contains("of " + run.file.path));
  CHECK(at::equal(run.adapter->parameters()[0], before));
}

TEST_CASE("checkpoints are whole, and only what is asked for stays", "[training]") {
  TrainingRun run(kOptions);
  const ScratchFolder folder("gemma_checkpoints");
  const auto path = folder.path().string();
  Checkpoints checkpoints(path);
  for (int step = 0; step < 3; ++step) {
    run.trainer->step();
    checkpoints.save(*run.trainer, {{"step", step}});
  }
  checkpoints.keep_only({1, 3});
  CHECK(checkpoints.steps() == std::vector<int64_t>{1, 3});
  CHECK(checkpoints.facts(3).at("step") == 2);
  // What a cut writing and a cut removal leave behind.
  std::filesystem::create_directories(path + "/step-00000004.Xy3dEf");
  std::filesystem::create_directories(path + "/step-00000002.gone");
  CHECK(Checkpoints(path).steps() == std::vector<int64_t>{1, 3});
  CHECK_FALSE(std::filesystem::exists(path + "/step-00000004.Xy3dEf"));
  CHECK_FALSE(std::filesystem::exists(path + "/step-00000002.gone"));
  std::ofstream(path + "/step-00000003/state.safetensors") << "short";
  CHECK_THAT(error_of([&] { checkpoints.load(3, *run.trainer); }),
             Catch::Contains("step-00000003/state.safetensors"));
}

TEST_CASE("parameters are chosen by globs", "[training]") {
  auto model = small_models().wide;
  const auto trained = train_parameters(model, {"model.layers.1.mlp.*", "*norm.weight"});
  int64_t norms = 0;
  for (const auto& tensor : trained) {
    norms += tensor.decays ? 0 : 1;
    CHECK(tensor.parameter.requires_grad());
  }
  CHECK(norms == 4 * 6 + 1);
  CHECK(trained.size() == 3 + 25);
  CHECK_FALSE(model->tok_emb->weight.requires_grad());
  CHECK_THAT(error_of([&] { train_parameters(model, {"*.mlp.*", "lm_head"}); }),
             Catch::Contains("got \"lm_head\""));
}

TEST_CASE("the embedding's rows of tokens seen are trained, saved and gone on with", "[training]") {
  const LinesFile file(id_lines({12, 5, 9, 20}));
  const TrainingData data(file.path, nullptr, {.vocab_size = 1003});
  const auto rows = ids_seen(data);
  CHECK(at::equal(rows, at::tensor({1, 2, 3, 4, 101, 102, 103, 104}, at::kLong)));
  auto model = small_models().rounded;
  const auto before = model->tok_emb->weight.detach().clone();
  Batches batches(data, {.rows = 2, .seed = 3});
  TrainingPass pass(model);
  auto trained = train_parameters(model, {"*"});
  train_rows(rows, model, pass, trained);
  Trainer trainer(model, pass, batches, trained, {.learning_rate = 1e-2, .steps = 6});
  for (int step = 0; step < 3; ++step) {
    trainer.step();
  }
  const auto moved = (model->tok_emb->weight.detach() - before).abs().amax(1).gt(0).nonzero();
  CHECK(at::equal(moved.flatten(), rows));
  const auto state = trainer.state();
  CHECK(state.at("model.embed_tokens.weight").sizes() == at::IntArrayRef{8, 128});
  CHECK(state.at("model.embed_tokens.weight.exp_avg").sizes() == at::IntArrayRef{8, 128});

  auto kept = TensorMap();
  for (const auto& [name, tensor] : state) {
    kept.emplace(name, tensor.clone());
  }
  trainer.step();
  const auto after = model->tok_emb->weight.detach().clone();
  trainer.load(kept);
  CHECK_FALSE(at::equal(model->tok_emb->weight, after));
  trainer.step();
  CHECK(at::equal(model->tok_emb->weight, after));

  kept.at("model.embed_tokens.weight.rows")[7] = 900;
  CHECK_THAT(error_of([&] { trainer.load(kept); }), Catch::Contains("expected the rows that are"));
  auto frozen = train_parameters(model, {"*norm.weight"});
  CHECK_THAT(error_of([&] { train_rows(rows, model, pass, frozen); }), Catch::Contains("frozen"));
}
