#include "gemma_torch/inspect/patch.h"

#include <ATen/Functions.h>

#include <limits>

#include "support/catch.h"
#include "support/error_of.h"
#include "support/golden.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

constexpr int64_t kT = 21;  // the window is 8

at::Tensor some_ids(int64_t step = 37, int64_t T = kT) {
  return ((at::arange(T, at::kLong) * step + 5) % 1003).unsqueeze(0);
}

at::Tensor logits_of(Gemma3Model model, const at::Tensor& ids, const Probe& probe) {
  const torch::NoGradGuard no_grad;
  return model->forward(ids, /*cache=*/nullptr, probe);
}

const Probe kIdentity = [](const At&, const at::Tensor& x) { return x; };

Probe probe_of(const Gemma3Model& model, std::vector<Edit> edits, int64_t T = kT) {
  return edits_probe(std::move(edits), model->cfg, T);
}

/// A site's value in a run, before and after the edits of it.
struct Seen {
  at::Tensor before, after;
};

Seen seen(const Gemma3Model& model, const Edit& edit, const at::Tensor& ids = some_ids()) {
  const auto edits = probe_of(model, {edit});
  Seen found;
  logits_of(model, ids, [&](const At& at, const at::Tensor& x) {
    const auto y = edits(at, x);
    if (at.site == edit.site.site && at.layer == edit.site.layer) {
      found = {x, y};
    } else {
      CHECK(y.is_same(x));  // other sites are not touched
    }
    return y;
  });
  return found;
}

/// Which elements differ.
at::Tensor changed(const Seen& value) {
  return value.before != value.after;
}

Edit zero(SiteAt site, Part part = {}) {
  return {.site = site, .part = std::move(part)};
}

Edit noise(SiteAt site, uint64_t seed, double std = 2, Fill fill = Fill::kNoise) {
  return {.site = site, .with = {.fill = fill, .std = std, .seed = seed}};
}

Edit value(SiteAt site, at::Tensor x, Part part = {}) {
  return {site, std::move(part), {.fill = Fill::kValue, .value = std::move(x)}};
}

std::string refused(const Gemma3Model& model, const Edit& edit, int64_t T = kT) {
  return error_of([&] { probe_of(model, {edit}, T); });
}

}  // namespace

TEST_CASE("a site's own value in its place changes no bit", "[patch]") {
  const auto models = small_models();
  for (const auto& model : {models.wide, models.rounded}) {
    const auto ids = some_ids();
    const auto want = logits_of(model, ids, kIdentity);
    const auto sites = model_sites(model->cfg.n_layers);
    const auto values = site_values(model, ids, sites);
    REQUIRE(values.size() == sites.size());
    std::vector<Edit> all;
    for (const auto& site : sites) {
      CAPTURE(site.name());
      const auto whole = value(site, values.at(site.name()));
      CHECK(logits_of(model, ids, probe_of(model, {whole})).equal(want));
      auto part = whole;
      part.part = {.positions = {3, 20, 4}, .channels = {{1, 2}}, .row = 0};
      part.part.head = site_axis(site.site, "HG") < 0 ? std::optional<int64_t>() : 1;
      CHECK(logits_of(model, ids, probe_of(model, {part})).equal(want));
      all.push_back(whole);
    }
    CHECK(logits_of(model, ids, probe_of(model, all)).equal(want));
  }
}

TEST_CASE("an edit changes its part and nothing else", "[patch]") {
  const auto model = small_models().wide;
  const auto check_part = [&](SiteAt site, const Part& part, const at::Tensor& where) {
    CAPTURE(site.name());
    const auto found = seen(model, zero(site, part));
    const auto zeroed = where.expand_as(found.after);
    CHECK(found.after.masked_select(zeroed).eq(0).all().item<bool>());
    CHECK(found.after.where(~zeroed, 0).equal(found.before.where(~zeroed, 0)));
    CHECK(changed(found).any().item<bool>());
  };
  const auto mark = [](int64_t axis, int64_t rank, int64_t first, int64_t last, int64_t size) {
    std::vector<int64_t> shape(static_cast<size_t>(rank), 1);
    shape[static_cast<size_t>(axis)] = size;
    const auto index = at::arange(size);
    return ((index >= first) & (index <= last)).view(shape);
  };
  check_part({Site::kResidPost, 2}, {}, at::ones({1, 1, 1}, at::kBool));
  check_part({Site::kEmbed}, {.positions = {7}}, mark(1, 3, 7, 7, kT));
  check_part({Site::kGate, 1}, {.channels = {{5, 90}}}, mark(2, 3, 5, 90, 192));
  check_part({Site::kQ, 3}, {.head = 3}, mark(1, 4, 3, 3, 4));
  check_part({Site::kV, 0}, {.head = 1}, mark(1, 4, 1, 1, 2));
  check_part({Site::kZ, 1}, {.head = 2}, mark(2, 4, 2, 2, 4));
  check_part({Site::kZ, 1},
             {.positions = {8, 9}, .head = 0, .channels = {{31, 31}}},
             mark(1, 4, 8, 9, kT) & mark(2, 4, 0, 0, 4) & mark(3, 4, 31, 31, 32));
  check_part({Site::kPattern, 2},
             {.positions = {12}, .head = 1, .channels = {{10, 11}}},
             mark(2, 4, 12, 12, kT) & mark(1, 4, 1, 1, 4) & mark(3, 4, 10, 11, kT));
}

TEST_CASE("a mean is one of all positions, of each head and channel", "[patch]") {
  const auto model = small_models().wide;
  const auto found = seen(model,
                          {.site = {Site::kV, 1},
                           .part = {.positions = {2, 5}, .head = 1},
                           .with = {.fill = Fill::kMean}});
  const auto mean = found.before.select(1, 1).mean(/*dim=*/1);  // (1, D)
  CHECK(max_difference(found.after[0][1][2], mean[0]) < kFloatTolerance);
  CHECK(found.after[0][1][5].equal(found.after[0][1][2]));
  CHECK(found.after[0][1][3].equal(found.before[0][1][3]));
  CHECK(found.after[0][0].equal(found.before[0][0]));
}

TEST_CASE("noise has the deviation asked for and repeats with its seed", "[patch]") {
  const auto model = small_models().wide;
  const auto after = [&](const Edit& edit) { return seen(model, edit).after; };
  const auto site = SiteAt{Site::kResidMid, 1};
  const auto drawn = after(noise(site, 3));  // (1, 21, 128)
  CHECK(std::abs(drawn.mean().item<double>()) < 0.2);
  CHECK(std::abs(drawn.std().item<double>() - 2) < 0.15);
  CHECK(drawn.equal(after(noise(site, 3))));
  CHECK_FALSE(drawn.equal(after(noise(site, 4))));
  CHECK_FALSE(drawn.equal(after(noise({Site::kResidMid, 2}, 3))));
  CHECK_FALSE(drawn.equal(after(noise({Site::kMlpIn, 1}, 3))));
  CHECK_FALSE(drawn[0][4].equal(drawn[0][5]));
  CHECK(max_difference(after(noise(site, 3, 4)), 2 * drawn) < kFloatTolerance);
  auto some = noise(site, 3);
  some.part.positions = {5, 17};
  CHECK(after(some)[0][17].equal(drawn[0][17]));  // whichever others are edited
  const auto added = seen(model, noise(site, 3, 2, Fill::kAddNoise));
  CHECK(max_difference(added.after, added.before + drawn) < kFloatTolerance);
  const auto rounded = seen(small_models().rounded, noise(site, 3)).after;
  CHECK(rounded.equal(drawn.to(at::kBFloat16)));
}

TEST_CASE("noise is the same in every row of a batch", "[patch]") {
  const auto model = small_models().wide;
  const auto rows = at::cat({some_ids(), some_ids(11)});
  const auto found = seen(model, noise({Site::kEmbed}, 8), rows);
  CHECK(found.after[0].equal(found.after[1]));
}

TEST_CASE("a value of another prompt or of fewer axes takes the part's place", "[patch]") {
  const auto model = small_models().wide;
  const auto site = SiteAt{Site::kZ, 2};
  const auto other = site_values(model, some_ids(11), {site}).at(site.name());
  const auto found = seen(model, value(site, other, {.positions = {6}, .head = 3}));
  CHECK(found.after[0][6][3].equal(other[0][6][3]));
  CHECK(changed(found).sum().item<int64_t>() == 32);
  const auto direction = at::arange(128, at::kFloat);
  const auto all = seen(model, value({Site::kResidPre, 1}, direction, {.positions = {0, 9}}));
  CHECK(all.after[0][9].equal(direction));
  CHECK(all.after[0][0].equal(direction));
  CHECK(all.after[0][1].equal(all.before[0][1]));
  const auto wide = seen(model, value({Site::kEmbed}, at::ones({1, 1}, at::kDouble)));
  CHECK(wide.after.scalar_type() == at::kFloat);
  CHECK(wide.after.eq(1).all().item<bool>());
}

TEST_CASE("edits act one after another, and leave the value they read", "[patch]") {
  const auto model = small_models().wide;
  const auto site = SiteAt{Site::kAttnOut, 1};
  const auto before = site_values(model, some_ids(), {site}).at(site.name());
  const auto probe = probe_of(model,
                              {zero(site),
                               {.site = site, .with = {.fill = Fill::kAddNoise, .seed = 1}},
                               zero({Site::kAttnOut, 3})});
  const auto x = before.clone();
  const auto positions = at::arange(kT);
  const auto y = probe({site.site, site.layer, positions}, x);
  CHECK(x.equal(before));
  CHECK(y.equal(seen(model, noise(site, 1, 1)).after));  // nothing was left to add the noise to
  CHECK(probe({Site::kMlpOut, 1, positions}, x).is_same(x));
}

TEST_CASE("rows of a batch are edited alone and equal single runs", "[patch]") {
  const auto model = small_models().wide;
  const auto ids = some_ids();
  const std::vector<Edit> edits = {zero({Site::kResidPost, 1}, {.positions = {20}}),
                                   zero({Site::kQ, 2}, {.head = 1}),
                                   noise({Site::kMlpOut, 0}, 5)};
  std::vector<Edit> rows;
  for (const auto& edit : edits) {
    rows.push_back(edit);
    rows.back().part.row = static_cast<int64_t>(rows.size());  // row 0 stays as it is
  }
  const auto batch = logits_of(model, ids.expand({4, kT}), probe_of(model, rows));
  CHECK(max_difference(batch[0], logits_of(model, ids, {})[0]) < kFloatTolerance);
  for (size_t i = 0; i < edits.size(); ++i) {
    const auto alone = logits_of(model, ids, probe_of(model, {edits[i]}));
    CHECK(max_difference(batch[static_cast<int64_t>(i) + 1], alone[0]) < kFloatTolerance);
    CHECK(max_difference(alone[0], batch[0]) > 100 * kFloatTolerance);
  }
  CHECK_THAT(error_of([&] { logits_of(model, ids, probe_of(model, rows)); }),
             Catch::Contains("blocks.0.mlp_out: row: expected -1 to 0, got 3"));
}

TEST_CASE("positions are places in the sequence where a cache holds its beginning", "[patch]") {
  const torch::NoGradGuard no_grad;
  const auto model = small_models().wide;
  auto modules = model;
  const auto ids = some_ids();
  const auto site = SiteAt{Site::kResidPost, 1};
  const auto other = site_values(model, some_ids(11), {site}).at(site.name());
  const auto probe =
      probe_of(model, {value(site, other, {.positions = {4, 15}}), noise({Site::kMlpOut, 2}, 6)});
  KvCache cache(model->cfg, {.capacity = 32, .dtype = at::kFloat});
  std::vector<at::Tensor> pieces;
  for (const auto& piece : {ids.narrow(1, 0, 10), ids.narrow(1, 10, kT - 10)}) {
    pieces.push_back(modules->forward(piece, &cache, probe));
  }
  CHECK(max_difference(at::cat(pieces, /*dim=*/1), logits_of(model, ids, probe)) < kFloatTolerance);
  const auto late = probe_of(model, {value(site, other)});
  CHECK_THAT(error_of([&] { modules->forward(ids.narrow(1, 0, 3), &cache, late); }),
             Catch::Contains("position of the value: expected 0 to 20, got 23"));
}

TEST_CASE("gradients flow around an edit and not through it", "[patch]") {
  auto model = small_models().wide;
  const auto probe = probe_of(model, {zero({Site::kEmbed}, {.positions = {20}})});
  at::Tensor embedded;
  const auto logits = model->forward(some_ids(), nullptr, [&](const At& at, const at::Tensor& x) {
    if (at.site == Site::kEmbed) {
      embedded = x;
      embedded.retain_grad();
    }
    return probe(at, x);
  });
  logits.sum().backward();
  CHECK(embedded.grad()[0][20].eq(0).all().item<bool>());
  CHECK(embedded.grad()[0][19].ne(0).all().item<bool>());
}

TEST_CASE("an edit that does not fit is refused before any run", "[patch]") {
  const auto model = small_models().wide;
  const SiteAt z = {Site::kZ, 1};
  CHECK_THAT(refused(model, zero({Site::kZ, 4})),
             Catch::Contains("[patch] blocks.4.z: layer: expected 0 to 3, got 4"));
  CHECK_THAT(refused(model, zero({Site::kZ})), Catch::Contains("layer: expected 0 to 3, got -1"));
  CHECK_THAT(refused(model, zero({Site::kEmbed, 0})), Catch::Contains("layer: expected -1, got 0"));
  CHECK_THAT(refused(model, zero(z, {.positions = {3, 21}})),
             Catch::Contains("blocks.1.z: position: expected 0 to 20, got 21"));
  CHECK_THAT(refused(model, zero(z, {.positions = {-1}})), Catch::Contains("got -1"));
  CHECK_THAT(refused(model, zero(z, {.head = 4})), Catch::Contains("head: expected 0 to 3, got 4"));
  CHECK_THAT(refused(model, zero({Site::kK, 1}, {.head = 2})),
             Catch::Contains("blocks.1.k: head: expected 0 to 1, got 2"));
  CHECK_THAT(refused(model, zero({Site::kGate, 1}, {.head = 0})),
             Catch::Contains("blocks.1.gate: head: expected a site with heads"));
  CHECK_THAT(refused(model, zero(z, {.channels = {{0, 32}}})),
             Catch::Contains("last channel: expected 0 to 31, got 32"));
  CHECK_THAT(refused(model, zero(z, {.channels = {{-1, 3}}})), Catch::Contains("first channel"));
  CHECK_THAT(refused(model, zero(z, {.channels = {{5, 4}}})),
             Catch::Contains("channels: expected 5 or more, got 4"));
  CHECK_THAT(refused(model, value(z, at::zeros({1, 20, 4, 32}))),
             Catch::Contains("value: expected (1, 21, 4, 32) or 1 along an axis, got (1, 20, 4, "
                             "32). Hint: another prompt"));
  CHECK_THAT(refused(model, value(z, at::zeros({1, 1, kT, 4, 32}))), Catch::Contains("[patch]"));
  CHECK_THAT(refused(model, value(z, {})), Catch::Contains("value: expected a tensor, got none"));
  CHECK_THAT(refused(model, noise(z, 1, -1)), Catch::Contains("of 0 or more, got -1"));
  CHECK_THAT(refused(model, noise(z, 1, std::numeric_limits<double>::infinity())),
             Catch::Contains("got inf"));
  CHECK_THAT(error_of([&] { site_values(model, some_ids()[0], {z}); }),
             Catch::Contains("ids: expected (1, T), got (21)"));
}
