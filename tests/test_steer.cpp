#include "gemma_torch/inspect/steer.h"

#include <ATen/Functions.h>

#include <fstream>
#include <limits>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/engine/engine.h"
#include "gemma_torch/generate/generate.h"
#include "gemma_torch/inspect/patch.h"
#include "gemma_torch/inspect/site_table.h"
#include "gemma_torch/inspect/steer_measure.h"
#include "gemma_torch/io/gguf.h"
#include "gemma_torch/io/gguf_writer.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/golden.h"
#include "support/scratch.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;
using Catch::Matchers::ContainsSubstring;

namespace {

std::vector<int64_t> ids_of(int64_t first, int64_t step, int64_t count) {
  std::vector<int64_t> ids = {2};  // BOS
  for (int64_t i = 0; i < count; ++i) {
    ids.push_back((first + step * i) % 1003);
  }
  return ids;
}

const std::vector<PromptPair> kPairs = {{ids_of(5, 37, 9), ids_of(6, 31, 7)},
                                        {ids_of(15, 7, 4), ids_of(19, 3, 6)},
                                        {ids_of(400, 11, 3), ids_of(410, 17, 3)}};

at::Tensor as_row(const std::vector<int64_t>& ids) {
  return at::tensor(ids, at::kLong).unsqueeze(0);
}

at::Tensor logits_of(Gemma3Model model, const std::vector<int64_t>& ids, const Probe& probe) {
  const torch::NoGradGuard no_grad;
  return model->forward(as_row(ids), /*cache=*/nullptr, probe);
}

/// (T, E) float64 values of a site in a run.
at::Tensor value_of(const Gemma3Model& model, const std::vector<int64_t>& ids, SiteAt site) {
  return site_values(model, as_row(ids), {site}).at(site.name())[0].to(at::kDouble);
}

/// (P, E) differences of the pairs' last positions, or of the means over what follows BOS.
at::Tensor differences(const Gemma3Model& model, SiteAt site, bool mean) {
  std::vector<at::Tensor> rows;
  const auto pool = [&](const std::vector<int64_t>& ids) {
    const auto value = value_of(model, ids, site);
    return mean ? value.slice(0, 1).mean(0) : value[-1];
  };
  for (const auto& pair : kPairs) {
    rows.push_back(pool(pair.positive) - pool(pair.negative));
  }
  return at::stack(rows);
}

Direction random_direction(const Gemma3Config& cfg, Site site = Site::kResidPost) {
  torch::manual_seed(3);
  Direction direction{.site = site};
  for (const int64_t layer : {1, 2, 3}) {
    direction.vectors[layer] = at::randn({site_shape(site, cfg, 1, 1).back()});
  }
  return direction;
}

void check_equal(const Direction& a, const Direction& b) {
  REQUIRE(a.vectors.size() == b.vectors.size());
  CHECK(a.site == b.site);
  for (const auto& [layer, vector] : a.vectors) {
    CHECK(vector.equal(b.vectors.at(layer)));
  }
}

}  // namespace

TEST_CASE("a direction is the mean of the pairs' differences", "[steer]") {
  const auto model = small_models().wide;
  for (const auto pool : {Pool::kLast, Pool::kMean}) {
    const auto made = make_direction(model, kPairs, {.layers = {0, 3}, .pool = pool});
    CHECK(made.direction.vectors.size() == 2);
    for (const int64_t layer : {0, 3}) {
      const auto want = differences(model, {Site::kResidPost, layer}, pool == Pool::kMean);
      CHECK(max_difference(made.direction.vectors.at(layer), want.mean(0)) < 1e-5);
      const auto& fit = made.fits.at(layer);
      CHECK(std::abs(fit.norm - want.mean(0).norm().item<double>()) < 1e-5);
      const auto along = want.mv(want.mean(0) / want.mean(0).norm());
      CHECK(std::abs(fit.agree - along.gt(0).sum().item<double>() / 3) < 1e-12);
      const auto explained = along.square().sum() / want.square().sum();
      CHECK(std::abs(fit.explained - explained.item<double>()) < 1e-9);
    }
  }
  const auto all = make_direction(model, kPairs, {.site = Site::kMlpOut});
  CHECK(all.direction.vectors.size() == 4);
  const auto want = differences(model, {Site::kMlpOut, 2}, /*mean=*/false).mean(0);
  CHECK(max_difference(all.direction.vectors.at(2), want) < 1e-5);
}

TEST_CASE("PCA finds the component along which the differences are largest", "[steer]") {
  const auto model = small_models().wide;
  const auto made = make_direction(model, kPairs, {.layers = {2}, .method = DirectionMethod::kPca});
  const auto vector = made.direction.vectors.at(2).to(at::kDouble);
  const auto d = differences(model, {Site::kResidPost, 2}, /*mean=*/false);
  // By the eigenvectors of d^T d: another way to the same component.
  const auto [values, vectors] = at::linalg_eigh(d.t().mm(d));
  const auto unit = vectors.select(1, -1);
  CHECK(std::abs(std::abs(unit.dot(vector).item<double>()) / vector.norm().item<double>() - 1) <
        1e-6);
  CHECK(d.mv(vector).mean().item<double>() > 0);  // the sign is the pairs'
  CHECK(std::abs(vector.norm().item<double>() - d.mean(0).dot(unit).abs().item<double>()) < 1e-5);
  CHECK(std::abs(made.fits.at(2).explained - (values[-1] / d.square().sum()).item<double>()) <
        1e-6);
  // The other way round, the pairs point the other way.
  std::vector<PromptPair> swapped;
  for (const auto& pair : kPairs) {
    swapped.push_back({pair.negative, pair.positive});
  }
  const auto back =
      make_direction(model, swapped, {.layers = {2}, .method = DirectionMethod::kPca});
  CHECK(max_difference(back.direction.vectors.at(2), -vector) < 1e-5);
}

TEST_CASE("steering adds strength times the vector at the layers asked for", "[steer]") {
  const auto models = small_models();
  const auto ids = ids_of(9, 41, 20);
  for (const auto& model : {models.wide, models.rounded}) {
    const auto direction = random_direction(model->cfg);
    const auto probe = steer_probe(direction, {.layers = {1, 3}, .strength = -1.5}, model->cfg);
    logits_of(model, ids, [&](const At& at, const at::Tensor& x) {
      const auto y = probe(at, x);
      const bool steered = at.site == Site::kResidPost && (at.layer == 1 || at.layer == 3);
      if (steered) {
        const auto added = (direction.vectors.at(at.layer) * -1.5).to(x.scalar_type());
        CHECK(y.equal(x + added));
      } else {
        CHECK(y.is_same(x));
      }
      return y;
    });
    const Probe none;
    const auto zero = steer_probe(direction, {.strength = 0}, model->cfg);
    CHECK(logits_of(model, ids, zero).equal(logits_of(model, ids, none)));
    const auto all = steer_probe(direction, {}, model->cfg);
    const auto named = steer_probe(direction, {.layers = {1, 2, 3}}, model->cfg);
    CHECK(logits_of(model, ids, all).equal(logits_of(model, ids, named)));
    CHECK_FALSE(logits_of(model, ids, all).equal(logits_of(model, ids, none)));
  }
}

TEST_CASE("keep_norm turns a value and keeps its length", "[steer]") {
  const auto model = small_models().wide;
  const auto direction = random_direction(model->cfg);
  const auto probe = steer_probe(direction, {.strength = 2, .keep_norm = true}, model->cfg);
  const auto positions = at::arange(5);
  const auto x = at::randn({1, 5, 128});
  const auto y = probe({Site::kResidPost, 2, positions}, x);
  CHECK(max_difference(y.norm(2, -1), x.norm(2, -1)) < 1e-5);
  const auto moved = x + 2 * direction.vectors.at(2);
  CHECK(max_difference(y / y.norm(2, -1, true), moved / moved.norm(2, -1, true)) < 1e-6);
}

TEST_CASE("a steered engine says what the steered modules say, token by token", "[steer]") {
  const auto model = small_models().wide;
  const auto probe = steer_probe(random_direction(model->cfg), {.strength = 1}, model->cfg);
  const auto engine =
      make_engine(model, {.kind = EngineKind::kEager, .capacity = 40, .probe = probe});
  const auto prompt = ids_of(9, 41, 12);
  const auto result =
      generate(*engine, {prompt}, {.max_new_tokens = 12, .sampling = {.temperature = 0}});
  auto ids = prompt;
  for (const auto id : result.rows[0].ids) {
    const auto logits = logits_of(model, ids, probe)[0][-1];
    CHECK(logits.argmax().item<int64_t>() == id);
    ids.push_back(id);
  }
}

TEST_CASE("a direction comes back from either format", "[steer]") {
  const auto cfg = small_config(at::kFloat);
  const ScratchFolder folder("steer");
  auto direction = random_direction(cfg);
  direction.made = {{"method", "pca"}, {"pairs", "3"}};
  save_direction(direction, folder / "a", DirectionFormat::kSafetensors);
  const auto loaded = load_direction(folder / "a");  // what it is, not how it is called
  check_equal(loaded, direction);
  CHECK(loaded.made == direction.made);
  save_direction(direction, folder / "b", DirectionFormat::kControlVector);
  check_equal(load_direction(folder / "b"), direction);
  const auto other = random_direction(cfg, Site::kMlpAct);
  save_direction(other, folder / "c", DirectionFormat::kSafetensors);
  check_equal(load_direction(folder / "c"), other);
  const auto with_0 = make_direction(small_models().wide, kPairs, {.layers = {0, 1}}).direction;
  save_direction(with_0, folder / "d", DirectionFormat::kSafetensors);
  check_equal(load_direction(folder / "d"), with_0);
}

TEST_CASE("a control vector is laid out as llama.cpp reads it", "[steer]") {
  const ScratchFolder folder("steer");
  const auto direction = random_direction(small_config(at::kFloat));
  save_direction(direction, folder / "v.gguf", DirectionFormat::kControlVector);
  const GgufFile file(folder / "v.gguf");
  CHECK(file.get_string("general.architecture") == "controlvector");
  CHECK(file.get_string("controlvector.model_hint") == "gemma3");
  CHECK(file.get_integer("controlvector.layer_count") == 3);
  CHECK(file.tensors().size() == 3);
  for (const int64_t layer : {1, 2, 3}) {
    const auto& tensor = file.tensors().at("direction." + std::to_string(layer));
    CHECK(tensor.type == GgmlType::kF32);
    CHECK(tensor.shape == std::vector<int64_t>{128});
  }
}

TEST_CASE("what cannot be a direction is refused by name", "[steer]") {
  const auto model = small_models().wide;
  const auto& cfg = model->cfg;
  const ScratchFolder folder("steer");
  const auto save = [&](const Direction& direction, DirectionFormat format) {
    return error_of([&] { save_direction(direction, folder / "no", format); });
  };
  auto zero = random_direction(cfg);
  zero.vectors[0] = at::zeros({128});
  CHECK_THAT(save(zero, DirectionFormat::kControlVector), ContainsSubstring("layer 0"));
  CHECK_THAT(save(random_direction(cfg, Site::kMlpOut), DirectionFormat::kControlVector),
             ContainsSubstring("mlp_out"));
  CHECK_THAT(save({}, DirectionFormat::kSafetensors), ContainsSubstring("got none"));
  CHECK_FALSE(std::ifstream(folder / "no").good());

  const auto load = [&](const TensorMap& tensors, const Metadata& metadata = {}) {
    save_safetensors(folder / "x", tensors, metadata);
    return error_of([&] { load_direction(folder / "x"); });
  };
  const auto vector = at::ones({128});
  CHECK_THAT(load({{"direction.x", vector}}), ContainsSubstring("got direction.x"));
  CHECK_THAT(load({{"direction.-1", vector}}), ContainsSubstring("got direction.-1"));
  CHECK_THAT(load({{"direction.01", vector}}), ContainsSubstring("got direction.01"));
  CHECK_THAT(load({{"direction.", vector}}), ContainsSubstring("got direction."));
  CHECK_THAT(load({{"weight", vector}}), ContainsSubstring("got weight"));
  CHECK_THAT(load({{"direction.1", vector.view({2, 64})}}), ContainsSubstring("(2, 64)"));
  CHECK_THAT(load({{"direction.1", vector.to(at::kInt)}}), ContainsSubstring("Int"));
  CHECK_THAT(load({{"direction.1", vector}, {"direction.2", at::ones({64})}}),
             ContainsSubstring("direction.2: expected 128 numbers as in the others, got 64"));
  CHECK_THAT(load({{"direction.1", vector / 0}}), ContainsSubstring("finite"));
  CHECK_THAT(load({{"direction.1", vector}}, {{"site", "resid"}}), ContainsSubstring("got resid"));
  CHECK_THAT(load({}), ContainsSubstring("got none"));
  GgufWriter file;
  file.string("general.architecture", "gemma3");
  write_file(folder / "x", file.bytes());
  CHECK_THAT(error_of([&] { load_direction(folder / "x"); }),
             ContainsSubstring("expected controlvector, got gemma3"));

  const auto probe = [&](const Direction& direction, const SteerOptions& options) {
    return error_of([&] { steer_probe(direction, options, cfg); });
  };
  const auto good = random_direction(cfg);
  CHECK(probe(good, {}).empty());
  CHECK_THAT(probe(good, {.layers = {1, 0}}), ContainsSubstring("layer 0: expected one"));
  CHECK_THAT(probe(good, {.strength = std::numeric_limits<double>::infinity()}),
             ContainsSubstring("strength"));
  CHECK_THAT(probe({.vectors = {{9, vector}}}, {}), ContainsSubstring("0 to 3, got 9"));
  CHECK_THAT(probe({.vectors = {{1, at::ones({64})}}}, {}),
             ContainsSubstring("blocks.1.resid_post: expected (128), got (64)"));
  CHECK_THAT(probe({.site = Site::kZ, .vectors = {{1, at::ones({32})}}}, {}),
             ContainsSubstring("without heads"));
  CHECK_THAT(probe({.site = Site::kEmbed, .vectors = {{0, vector}}}, {}),
             ContainsSubstring("got embed"));

  const auto make = [&](const std::vector<PromptPair>& pairs, const DirectionOptions& options) {
    return error_of([&] { make_direction(model, pairs, options); });
  };
  CHECK_THAT(make({}, {}), ContainsSubstring("pairs: expected at least one"));
  CHECK_THAT(make({{{2, 5}, {}}}, {}), ContainsSubstring("pair 0"));
  CHECK_THAT(make({{{2, 5}, {1003}}}, {}), ContainsSubstring("got 1003"));
  CHECK_THAT(make(kPairs, {.layers = {4}}), ContainsSubstring("got 4"));
  CHECK_THAT(make({{{2, 5}, {2, 5}}}, {}), ContainsSubstring("expected pairs that differ"));
  CHECK_THAT(make(kPairs, {.on_progress = [](int64_t, int64_t) { return false; }}),
             ContainsSubstring("stopped after 2 of 6 prompts"));
}

TEST_CASE("a measure is the log-odds of two sets of next tokens", "[steer]") {
  const auto model = small_models().wide;
  const auto direction = random_direction(model->cfg);
  const std::vector<std::vector<int64_t>> prompts = {ids_of(5, 37, 9), ids_of(90, 3, 4)};
  const MeasureOptions options{
      .toward = {7, 8}, .away = {100}, .strengths = {0, 2}, .layers = {2, 3}};
  const auto rows = measure_steering(model, direction, prompts, options);
  REQUIRE(rows.size() == 2);
  for (const auto& row : rows) {
    double mean = 0, kl = 0;
    for (size_t i = 0; i < prompts.size(); ++i) {
      const auto probe =
          steer_probe(direction, {.layers = {2, 3}, .strength = row.strength}, model->cfg);
      const auto p = logits_of(model, prompts[i], probe)[0][-1].to(at::kDouble).softmax(0);
      const auto plain = logits_of(model, prompts[i], {})[0][-1].to(at::kDouble).softmax(0);
      const auto want = ((p[7] + p[8]) / p[100]).log().item<double>();
      CHECK(std::abs(row.scores[i] - want) < 1e-5);
      mean += want / 2;
      kl += (plain * (plain / p).log()).sum().item<double>() / 2;
    }
    CHECK(std::abs(row.mean - mean) < 1e-5);
    CHECK(std::abs(row.kl - kl) < 1e-6);
  }
  CHECK(rows[0].kl == 0);
  CHECK(rows[1].kl > 1e-4);

  CHECK(grows_with_strength({{.strength = 1, .mean = 2}, {.strength = -1, .mean = 1}}));
  CHECK_FALSE(grows_with_strength({{.strength = 1, .mean = 1}, {.strength = -1, .mean = 1}}));
  CHECK_FALSE(grows_with_strength({{.strength = 1, .mean = 1}}));
  const auto refused = [&](MeasureOptions wrong) {
    return error_of([&] { measure_steering(model, direction, prompts, wrong); });
  };
  auto wrong = options;
  wrong.away = {};
  CHECK_THAT(refused(wrong), ContainsSubstring("tokens against"));
  wrong = options;
  wrong.toward = {1003};
  CHECK_THAT(refused(wrong), ContainsSubstring("got 1003"));
  wrong = options;
  wrong.strengths = {};
  CHECK_THAT(refused(wrong), ContainsSubstring("2 and 0"));
  wrong = options;
  wrong.on_progress = [](int64_t done, int64_t) { return done < 3; };
  CHECK_THAT(refused(wrong), ContainsSubstring("stopped after 3 of 6 runs"));
}
