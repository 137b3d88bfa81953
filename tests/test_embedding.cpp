#include "gemma_torch/inspect/embedding.h"

#include <ATen/Functions.h>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/io/npy_writer.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/golden.h"
#include "support/scratch.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

std::vector<int64_t> some_ids(int64_t n, int64_t start) {
  std::vector<int64_t> ids = {2};
  for (int64_t i = 1; i < n; ++i) {
    ids.push_back((i * 37 + start) % 1003);
  }
  return ids;
}

/// A site's value over one text, (T, E), by the modules without a cache.
at::Tensor states(Gemma3Model model, const std::vector<int64_t>& ids, Site site, int64_t layer) {
  const torch::NoGradGuard no_grad;
  at::Tensor found;
  const Probe probe = [&](const At& at, const at::Tensor& value) {
    if (at.site == site && at.layer == layer) {
      found = value.squeeze(0).clone();
    }
    return value;
  };
  model->hidden(at::tensor(ids, at::kLong).unsqueeze(0), /*cache=*/nullptr, probe);
  return found;
}

double distance(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

constexpr double kRounding = 2e-5;

}  // namespace

TEST_CASE("each pooling weighs the tokens as it says", "[embed]") {
  auto model = small_models().wide;
  const auto ids = some_ids(21, 5);
  const auto x = states(model, ids, Site::kFinalNorm, -1);
  const auto one = [&](EmbedOptions options) {
    options.normalize = false;
    return embed(model, {ids}, options)[0];
  };
  CHECK(distance(one({}), x.mean(0)) < kRounding);
  CHECK(distance(one({.pooling = Pooling::kLast}), x[20]) < kRounding);
  const auto i = at::arange(1, 22, at::kFloat).unsqueeze(1);
  CHECK(distance(one({.pooling = Pooling::kWeighted}), (x * i).sum(0) / i.sum()) < kRounding);
  const auto rest = x.narrow(0, 2, 19), j = i.narrow(0, 0, 19);
  CHECK(distance(one({.skip = 2}), rest.mean(0)) < kRounding);
  CHECK(distance(one({.pooling = Pooling::kWeighted, .skip = 2}), (rest * j).sum(0) / j.sum()) <
        kRounding);
  CHECK(distance(one({.pooling = Pooling::kLast, .skip = 2}), x[20]) < kRounding);
}

TEST_CASE("layers are averaged", "[embed]") {
  auto model = small_models().wide;
  const auto ids = some_ids(9, 5);
  const auto found = embed(model, {ids}, {.layers = {0, 2}, .normalize = false});
  const auto want =
      (states(model, ids, Site::kResidPost, 0) + states(model, ids, Site::kResidPost, 2)) / 2;
  CHECK(distance(found[0], want.mean(0)) < kRounding);
}

TEST_CASE("vectors have length 1 unless they are asked for raw", "[embed]") {
  auto model = small_models().wide;
  const auto ids = some_ids(9, 5);
  const auto raw = embed(model, {ids}, {.normalize = false})[0];
  const auto unit = embed(model, {ids})[0];
  CHECK(unit.norm().item<double>() == Approx(1));
  CHECK(std::abs(raw.norm().item<double>() - 1) > 0.1);
  CHECK(distance(unit, raw / raw.norm()) < 1e-6);
  CHECK(unit_rows(at::zeros({1, 3})).equal(at::zeros({1, 3})));
}

TEST_CASE("a padded text has the vector of a run alone, in its own place", "[embed]") {
  auto model = small_models().wide;
  const std::vector<std::vector<int64_t>> texts = {
      some_ids(30, 5), some_ids(3, 7), some_ids(11, 9), {2}, some_ids(30, 11)};
  std::vector<int64_t> progress;
  for (const auto pooling : {Pooling::kMean, Pooling::kLast, Pooling::kWeighted}) {
    EmbedOptions options{.pooling = pooling, .batch = 4};
    progress.clear();
    options.on_progress = [&](int64_t done, int64_t total) {
      CHECK(total == 5);
      progress.push_back(done);
    };
    const auto together = embed(model, texts, options);
    CHECK(progress == std::vector<int64_t>{4, 5});
    for (size_t n = 0; n < texts.size(); ++n) {
      CAPTURE(n);
      const auto alone = embed(model, {texts[n]}, {.pooling = pooling})[0];
      CHECK(distance(together[static_cast<int64_t>(n)], alone) < kRounding);
    }
  }
}

TEST_CASE("a text longer than a pass is pooled over all of its passes", "[embed]") {
  auto model = small_models().wide;
  const auto ids = some_ids(700, 5);  // passes are of 512
  const auto x = states(model, ids, Site::kFinalNorm, -1);
  const auto found = embed(model, {ids, some_ids(20, 3)}, {.normalize = false});
  CHECK(distance(found[0], x.mean(0)) < kRounding);
}

TEST_CASE("what has no vector is named", "[embed]") {
  auto model = small_models().wide;
  const auto error = [&](const std::vector<std::vector<int64_t>>& texts, EmbedOptions options) {
    return error_of([&] { embed(model, texts, options); });
  };
  CHECK_THAT(error({}, {}), Catch::Contains("at least one, got none"));
  CHECK_THAT(error({{2}, {}}, {}), Catch::Contains("text 1: expected at least 1 token, got 0"));
  CHECK_THAT(error({{2}}, {.skip = 1}), Catch::Contains("at least 2 tokens, got 1"));
  CHECK(error({{2}}, {.pooling = Pooling::kLast, .skip = 1}).empty());
  CHECK_THAT(error({{2, 1003}}, {}), Catch::Contains("ids from 0 to 1002, got 1003"));
  CHECK_THAT(error({{2}}, {.layers = {4}}), Catch::Contains("layers: expected 0 to 3, got 4"));
  CHECK_THAT(error({{2}}, {.batch = 0}), Catch::Contains("batch"));
  CHECK_THAT(error({{2}}, {.skip = -1}), Catch::Contains("skip"));
}

TEST_CASE("the nearest rows are those of the whole table's cosines", "[embed]") {
  torch::manual_seed(5);
  const auto table =
      at::randn({20'000, 16}).to(at::kBFloat16);  // more rows than are held at a time
  const auto queries = at::randn({3, 16});
  const auto found = nearest_rows(table, queries, 7);
  const auto wide = table.to(at::kDouble), q = queries.to(at::kDouble);
  const auto cosine = at::matmul(q / q.norm(2, 1, true), (wide / wide.norm(2, 1, true)).t());
  const auto [values, ids] = cosine.topk(7, 1);
  CHECK(found.ids.equal(ids));
  CHECK(distance(found.similarity, values) < 1e-6);
  CHECK(ids.max().item<int64_t>() > 8192);
  CHECK(nearest_rows(table.narrow(0, 0, 4), queries, 4).ids.size(1) == 4);
  CHECK_THAT(error_of([&] { nearest_rows(table, queries, 0); }), Catch::Contains("1 to 20000"));
  CHECK_THAT(error_of([&] { nearest_rows(table, at::randn({1, 3}), 1); }),
             Catch::Contains("expected 16 columns, got 3"));
}

TEST_CASE("principal axes are those of the covariance", "[embed]") {
  torch::manual_seed(6);
  const auto x = at::matmul(at::randn({40, 6}), at::randn({6, 6})) + 3;
  const auto found = principal_axes(x, 3);
  const auto centred = x.to(at::kDouble) - x.to(at::kDouble).mean(0, true);
  const auto [values, vectors] = at::linalg_eigh(at::matmul(centred.t(), centred));
  for (int64_t axis = 0; axis < 3; ++axis) {
    CAPTURE(axis);
    CHECK(found.shares[axis].item<double>() ==
          Approx(values[5 - axis].item<double>() / values.sum().item<double>()));
    auto direction = vectors.select(1, 5 - axis);
    direction = direction * direction[direction.abs().argmax()].sign();
    CHECK(distance(found.coordinates.select(1, axis), at::mv(centred, direction)) < 1e-8);
  }
  CHECK_THAT(error_of([&] { principal_axes(x.narrow(0, 0, 2), 2); }),
             Catch::Contains("expected 1 to 1, got 2"));
}

TEST_CASE("an npy file has NumPy's header, then the numbers", "[npy]") {
  const ScratchFolder folder("gemma_npy");
  const auto x = at::arange(6, at::kFloat).view({2, 3});
  save_npy(folder / "x", x.t());  // strided
  const auto bytes = read_file(folder / "x");
  CHECK(bytes.substr(0, 8) == std::string("\x93NUMPY\x01\x00", 8));
  const auto length =
      static_cast<unsigned char>(bytes[8]) + 256 * static_cast<unsigned char>(bytes[9]);
  CHECK((10 + length) % 64 == 0);
  CHECK(bytes.size() == static_cast<size_t>(10 + length + 24));
  const auto header = bytes.substr(10, static_cast<size_t>(length));
  CHECK(header.starts_with("{'descr': '<f4', 'fortran_order': False, 'shape': (3,2,), }"));
  CHECK(header.back() == '\n');
  float values[6];
  std::memcpy(values, bytes.data() + 10 + length, sizeof(values));
  CHECK(std::vector<float>(values, values + 6) == std::vector<float>{0, 3, 1, 4, 2, 5});
  save_npy(folder / "y", at::zeros({4}, at::kLong));
  CHECK(read_file(folder / "y").find("{'descr': '<i8', 'fortran_order': False, 'shape': (4,), }") ==
        10);
  CHECK_THAT(error_of([&] { save_npy(folder / "z", x.to(at::kBFloat16)); }),
             Catch::Contains("BFloat16 has no NumPy form"));
  CHECK_FALSE(std::filesystem::exists(folder / "z"));
}
