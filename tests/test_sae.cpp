#include "gemma_torch/inspect/sae.h"

#include <ATen/Functions.h>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/engine/engine.h"
#include "gemma_torch/generate/generate.h"
#include "gemma_torch/inspect/patch.h"
#include "gemma_torch/io/safetensors.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/golden.h"
#include "support/npz_writer.h"
#include "support/scratch.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;
using Catch::Matchers::ContainsSubstring;

namespace {

constexpr int64_t kFeatures = 50;
constexpr SaeSites kResid = {{Site::kResidPost, 1}, {Site::kResidPost, 1}};
constexpr SaeSites kMlp = {{Site::kMlpIn, 2}, {Site::kMlpOut, 2}};

TensorMap random_tensors(int64_t inputs, int64_t outputs, bool skip = false) {
  torch::manual_seed(11);
  TensorMap tensors = {{"W_enc", at::randn({inputs, kFeatures}) * 0.1},
                       {"W_dec", at::randn({kFeatures, outputs}) * 0.1},
                       {"b_enc", at::randn({kFeatures}) * 0.1},
                       {"b_dec", at::randn({outputs})},
                       {"threshold", at::rand({kFeatures}) * 0.5}};
  if (skip) {
    tensors["W_skip"] = at::randn({inputs, outputs}) * 0.1;
  }
  return tensors;
}

Sae random_sae(int64_t inputs = 128, int64_t outputs = 128, bool skip = false) {
  return make_sae(random_tensors(inputs, outputs, skip), "test");
}

at::Tensor some_ids(int64_t T = 21) {
  return ((at::arange(T, at::kLong) * 37 + 5) % 1003).unsqueeze(0);
}

at::Tensor logits_of(Gemma3Model model, const at::Tensor& ids, const Probe& probe) {
  const torch::NoGradGuard no_grad;
  return model->forward(ids, /*cache=*/nullptr, probe);
}

/// The definition, in float64, feature by feature.
at::Tensor activations_of(const Sae& sae, const at::Tensor& x) {
  const auto p = x.to(at::kDouble).matmul(sae.W_enc.to(at::kDouble)) + sae.b_enc.to(at::kDouble);
  return at::where(p > sae.threshold.to(at::kDouble), p.clamp_min(0), at::zeros_like(p));
}

at::Tensor output_of(const Sae& sae, const at::Tensor& x) {
  auto out = activations_of(sae, x).matmul(sae.W_dec.to(at::kDouble)) + sae.b_dec.to(at::kDouble);
  return sae.W_skip.defined() ? out + x.to(at::kDouble).matmul(sae.W_skip.to(at::kDouble)) : out;
}

/// Values of a site before and after a probe.
struct Seen {
  at::Tensor input, before, after;
};

Seen seen(const Gemma3Model& model, const SaeSites& sites, const Probe& probe) {
  Seen found;
  logits_of(model, some_ids(), [&](const At& at, const at::Tensor& x) {
    const auto y = probe(at, x);
    if (at.site == sites.input.site && at.layer == sites.input.layer) {
      found.input = x;
    }
    if (at.site == sites.output.site && at.layer == sites.output.layer) {
      found.before = x;
      found.after = y;
    } else {
      CHECK(y.is_same(x));
    }
    return y;
  });
  return found;
}

std::string refused(TensorMap tensors) {
  return error_of([&] { make_sae(tensors, "test"); });
}

}  // namespace

TEST_CASE("features and output are as defined", "[sae]") {
  const auto sae = random_sae(128, 96, /*skip=*/true);
  const auto x = at::randn({2, 7, 128}) * 2;
  const auto want = activations_of(sae, x);
  CHECK(want.count_nonzero().item<int64_t>() > 100);
  CHECK(want.eq(0).sum().item<int64_t>() > 100);
  CHECK(max_difference(sae.encode(x), want) < 1e-5);
  CHECK(sae.encode(x).eq(0).equal(want.eq(0)));
  CHECK(max_difference(sae.encode(x, {49, 3}), want.index({"...", at::tensor({49, 3})})) < 1e-5);
  CHECK(max_difference(sae.reconstruct(x), output_of(sae, x)) < 1e-4);
  CHECK(sae.reconstruct(x).sizes() == at::IntArrayRef({2, 7, 96}));
  // A threshold below 0 lets no negative activation through.
  auto low = sae;
  low.threshold = at::full({kFeatures}, -10.0);
  CHECK(low.encode(x).ge(0).all().item<bool>());
  // Many rows go through a few at a time, and come out in order.
  auto wide = random_tensors(4, 4);
  wide["W_enc"] = at::randn({4, 1 << 21});
  wide["W_dec"] = at::zeros({1 << 21, 4});
  wide["b_enc"] = wide["threshold"] = at::zeros({1 << 21});
  wide["W_skip"] = at::eye(4);
  wide["b_dec"] = at::zeros({4});
  const auto rows = at::randn({19, 4});
  CHECK(max_difference(make_sae(wide, "test").reconstruct(rows), rows) < 1e-6);
}

TEST_CASE("a file is either format, in any float dtype and either spelling", "[sae]") {
  const ScratchFolder folder("sae");
  const auto tensors = random_tensors(8, 8, /*skip=*/true);
  const auto want = make_sae(tensors, "test");
  const auto same = [&](const Sae& sae, double tolerance) {
    CHECK(max_difference(sae.W_enc, want.W_enc) <= tolerance);
    CHECK(max_difference(sae.W_dec, want.W_dec) <= tolerance);
    CHECK(max_difference(sae.W_skip, want.W_skip) <= tolerance);
    CHECK(max_difference(sae.b_enc, want.b_enc) <= tolerance);
    CHECK(max_difference(sae.b_dec, want.b_dec) <= tolerance);
    CHECK(max_difference(sae.threshold, want.threshold) <= tolerance);
    CHECK(sae.W_enc.scalar_type() == at::kFloat);
  };
  save_safetensors(folder / "a", tensors);
  same(load_sae(folder / "a"), 0);
  TensorMap other;
  for (const auto& [name, tensor] : tensors) {
    const auto spelt = name == "W_enc"    ? "w_enc"
                       : name == "W_dec"  ? "w_dec"
                       : name == "W_skip" ? "affine_skip_connection"
                                          : name;
    other[spelt] = tensor.to(at::kBFloat16);
  }
  save_safetensors(folder / "b", other);
  same(load_sae(folder / "b"), 0.02);
  std::vector<npz::Member> members;
  for (const auto& [name, tensor] : tensors) {
    std::string shape = "(";
    for (const auto size : tensor.sizes()) {
      shape += std::to_string(size) + ", ";
    }
    members.push_back({name + ".npy",
                       npz::npy(npz::header("<f4", shape + ")"),
                                {static_cast<const char*>(tensor.data_ptr()), tensor.nbytes()})});
  }
  write_file(folder / "c", npz::zip(members));
  same(load_sae(folder / "c"), 0);
}

TEST_CASE("tensors that are no autoencoder are refused by name", "[sae]") {
  const auto good = random_tensors(8, 6);
  const auto with = [&](const std::string& name, const at::Tensor& tensor) {
    auto tensors = good;
    tensors[name] = tensor;
    return refused(tensors);
  };
  CHECK(refused(good).empty());
  for (const auto& [name, tensor] : good) {
    auto tensors = good;
    tensors.erase(name);
    CHECK_THAT(refused(tensors), ContainsSubstring("test: " + name + " is missing"));
  }
  CHECK_THAT(with("w_enc", good.at("W_enc")), ContainsSubstring("W_enc appears twice"));
  CHECK_THAT(with("scaling", at::ones({1})), ContainsSubstring("got scaling"));
  CHECK_THAT(with("W_enc", at::ones({3, 8, 50})), ContainsSubstring("cross-layer"));
  CHECK_THAT(with("W_enc", at::ones({8, 51})), ContainsSubstring("W_dec: expected (51, 6)"));
  CHECK_THAT(with("W_dec", at::ones({6, 50})), ContainsSubstring("expected (50, 50), got (6, 50)"));
  CHECK_THAT(with("b_enc", at::ones({51})), ContainsSubstring("b_enc: expected (50), got (51)"));
  CHECK_THAT(with("b_dec", at::ones({8})), ContainsSubstring("b_dec: expected (6), got (8)"));
  CHECK_THAT(with("threshold", at::ones({1})), ContainsSubstring("threshold: expected (50)"));
  CHECK_THAT(with("W_skip", at::ones({6, 8})), ContainsSubstring("W_skip: expected (8, 6)"));
  CHECK_THAT(with("b_dec", at::ones({6}, at::kInt)), ContainsSubstring("expected floats, got Int"));
  CHECK_THAT(with("b_dec", at::ones({6}) / 0), ContainsSubstring("finite"));
}

TEST_CASE("sites must fit both ends", "[sae]") {
  const auto cfg = small_config(at::kFloat);
  const auto refusal = [&](const Sae& sae, const SaeSites& sites) {
    return error_of([&] { check_sae_sites(sae, sites, cfg); });
  };
  const auto sae = random_sae();
  CHECK(refusal(sae, kResid).empty());
  CHECK(refusal(sae, kMlp).empty());
  CHECK(refusal(sae, {{Site::kZ, 0}, {Site::kZ, 0}}).empty());  // 4 heads of 32
  CHECK(refusal(sae, {{Site::kEmbed}, {Site::kFinalNorm}}).empty());
  CHECK(refusal(random_sae(128, 192), {{Site::kMlpIn, 0}, {Site::kGate, 0}}).empty());
  CHECK_THAT(refusal(sae, {{Site::kGate, 0}, {Site::kGate, 0}}),
             ContainsSubstring("blocks.0.gate: its width is 192, the autoencoder's input has 128"));
  CHECK_THAT(refusal(sae, {{Site::kMlpIn, 0}, {Site::kUp, 0}}),
             ContainsSubstring("autoencoder's output has 128"));
  CHECK_THAT(refusal(sae, {{Site::kQ, 0}, {Site::kQ, 0}}), ContainsSubstring("axes B H T D"));
  CHECK_THAT(refusal(sae, {{Site::kMlpOut, 2}, {Site::kMlpIn, 2}}), ContainsSubstring("later"));
  CHECK_THAT(refusal(sae, {{Site::kMlpIn, 2}, {Site::kMlpOut, 1}}), ContainsSubstring("later"));
  CHECK_THAT(refusal(sae, {{Site::kFinalNorm}, {Site::kMlpOut, 1}}), ContainsSubstring("later"));
  CHECK_THAT(refusal(sae, {{Site::kMlpIn, 4}, {Site::kMlpOut, 4}}), ContainsSubstring("got 4"));
  const auto feature = [&](SaeEdit edit) {
    return error_of([&] { sae_probe(sae, kResid, edit, cfg); });
  };
  CHECK_THAT(feature({.activations = {{50, 0}}}), ContainsSubstring("expected 0 to 49, got 50"));
  CHECK_THAT(feature({.activations = {{-1, 0}}}), ContainsSubstring("got -1"));
  CHECK_THAT(feature({.activations = {{1, 0.0 / 0.0}}}), ContainsSubstring("feature 1"));
}

TEST_CASE("a reconstruction takes the output site's place", "[sae]") {
  const auto models = small_models();
  for (const auto& model : {models.wide, models.rounded}) {
    for (const auto& sites : {kResid, kMlp, SaeSites{{Site::kZ, 0}, {Site::kZ, 0}}}) {
      const auto sae = random_sae(128, 128, /*skip=*/sites.input.site == Site::kMlpIn);
      const auto found =
          seen(model, sites, sae_probe(sae, sites, {.reconstruct = true}, model->cfg));
      const auto want = output_of(sae, found.input.flatten(2)).view(found.before.sizes());
      CHECK(found.after.scalar_type() == found.before.scalar_type());
      const double rounding = found.before.scalar_type() == at::kFloat ? 1e-4 : 0.04;
      CHECK(max_difference(found.after, want) < rounding);
    }
  }
}

TEST_CASE("ablating a feature takes away its part and keeps the rest", "[sae]") {
  const auto model = small_models().wide;
  for (const auto& sites : {kResid, kMlp}) {
    const auto sae = random_sae();
    const auto edit = SaeEdit{.activations = {{7, 0}, {20, 3}}};
    const auto found = seen(model, sites, sae_probe(sae, sites, edit, model->cfg));
    const auto act = activations_of(sae, found.input);
    const auto w = sae.W_dec.to(at::kDouble);
    CHECK(act.select(-1, 7).count_nonzero().item<int64_t>() > 0);
    const auto want = found.before - act.select(-1, 7).unsqueeze(-1) * w[7] +
                      (3 - act.select(-1, 20)).unsqueeze(-1) * w[20];
    CHECK(max_difference(found.after, want) < 1e-4);
    // On top of a reconstruction: the output of changed activations.
    auto both = edit;
    both.reconstruct = true;
    const auto again = seen(model, sites, sae_probe(sae, sites, both, model->cfg));
    auto changed = act.clone();
    changed.select(-1, 7).fill_(0);
    changed.select(-1, 20).fill_(3);
    CHECK(max_difference(again.after, changed.matmul(w) + sae.b_dec) < 1e-4);
  }
}

TEST_CASE("an edit without a value changes no bit", "[sae]") {
  const auto models = small_models();
  for (const auto& model : {models.wide, models.rounded}) {
    auto tensors = random_tensors(128, 128);
    tensors["threshold"] = at::full({kFeatures}, 1e9);  // nothing is ever active
    const auto sae = make_sae(tensors, "test");
    const auto probe = sae_probe(sae, kResid, {.activations = {{3, 0}}}, model->cfg);
    CHECK(logits_of(model, some_ids(), probe).equal(logits_of(model, some_ids(), {})));
  }
}

TEST_CASE("an engine under a feature's edit says what the modules say", "[sae]") {
  const auto model = small_models().wide;
  const auto sae = random_sae();
  const auto probe = sae_probe(sae, kMlp, {.activations = {{7, 9}, {12, -4}, {30, 0}}}, model->cfg);
  const auto engine =
      make_engine(model, {.kind = EngineKind::kEager, .capacity = 40, .probe = probe});
  const std::vector<int64_t> prompt = {2, 9, 500, 31, 8, 77, 12, 400, 3, 90, 41};
  const auto result =
      generate(*engine, {prompt}, {.max_new_tokens = 12, .sampling = {.temperature = 0}});
  auto ids = prompt;
  for (const auto id : result.rows[0].ids) {
    const auto row = at::tensor(ids, at::kLong).unsqueeze(0);
    CHECK(logits_of(model, row, probe)[0][-1].argmax().item<int64_t>() == id);
    ids.push_back(id);
  }
}

TEST_CASE("top features and the fit are those of the whole activations", "[sae]") {
  const auto sae = random_sae(128, 96);
  const auto x = at::randn({9, 128}) * 2;
  const auto y = at::randn({9, 96});
  const auto [features, activations] = top_features(sae, x, 4);
  const auto want = std::get<0>(activations_of(sae, x).topk(4));
  CHECK(features.sizes() == at::IntArrayRef({9, 4}));
  CHECK(max_difference(activations, want) < 1e-5);
  CHECK(max_difference(sae.encode(x).gather(1, features), activations) == 0);
  CHECK(top_features(sae, x, 1000).features.size(1) == kFeatures);
  CHECK_THAT(error_of([&] { top_features(sae, x, 0); }), ContainsSubstring("top"));
  const auto fit = fit_of(sae, x, y);
  CHECK(std::abs(fit.l0 - activations_of(sae, x).count_nonzero().item<double>() / 9) < 1e-9);
  const auto missed = (y - output_of(sae, x)).square().sum();
  const auto spread = (y - y.mean(0)).to(at::kDouble).square().sum();
  CHECK(std::abs(fit.explained - (1 - (missed / spread).item<double>())) < 1e-5);
}
