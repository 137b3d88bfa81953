#include "gemma_torch/adapt/batches.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <numeric>

#include "support/catch.h"
#include "support/error_of.h"
#include "support/golden.h"
#include "support/lines_file.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;
using Ids = std::vector<int64_t>;

namespace {

// Another order of the same float32 sums; the angles of another column are rounded otherwise.
constexpr double kTolerance = 1e-5;

// A file and its examples.
struct Lines {
  explicit Lines(const std::string& text)
      : file(text), data(file.path, nullptr, {.vocab_size = 1003}) {}
  explicit Lines(const Ids& lengths) : Lines(id_lines(lengths)) {}

  LinesFile file;
  TrainingData data;
};

// So many lengths from 2 to 13, in no order.
Ids mixed_lengths(int64_t n) {
  Ids lengths;
  for (int64_t i = 0; i < n; ++i) {
    lengths.push_back(2 + i * i * 5 % 12);
  }
  return lengths;
}

bool same(const TrainingBatch& a, const TrainingBatch& b) {
  return at::equal(a.ids, b.ids) && at::equal(a.scored, b.scored) &&
         at::equal(a.targets, b.targets) && a.tokens == b.tokens && a.examples == b.examples &&
         a.first.defined() == b.first.defined() &&
         (!a.first.defined() || at::equal(a.first, b.first));
}

// The examples of each batch of an epoch.
std::vector<Ids> epoch_of(Batches& batches, int64_t epoch) {
  std::vector<Ids> found;
  batches.seek({.epoch = epoch});
  while (batches.position().epoch == epoch) {
    found.push_back(batches.next().examples);
  }
  return found;
}

Ids joined(const std::vector<Ids>& lists) {
  Ids all;
  for (const auto& list : lists) {
    all.insert(all.end(), list.begin(), list.end());
  }
  return all;
}

Ids up_to(int64_t n) {
  Ids all(static_cast<size_t>(n));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

at::Tensor rows(const std::vector<Ids>& values) {
  std::vector<at::Tensor> tensors;
  for (const auto& row : values) {
    tensors.push_back(at::tensor(row, at::kLong));
  }
  return at::stack(tensors);
}

}  // namespace

// From a Mersenne Twister and a seed_seq written in Python from their definitions.
TEST_CASE("the order of an epoch is the same on every machine", "[batches]") {
  CHECK(shuffled(12, 5, 0) == Ids{3, 6, 10, 9, 11, 5, 2, 0, 7, 1, 8, 4});
  CHECK(shuffled(12, 5, 1) == Ids{2, 9, 4, 10, 5, 11, 6, 7, 0, 8, 1, 3});
  CHECK(shuffled(12, (7ULL << 32U) + 5, 1LL << 32) == Ids{1, 5, 8, 3, 2, 10, 6, 11, 7, 4, 9, 0});
  CHECK(shuffled(5, 0, 0) == Ids{2, 1, 3, 0, 4});
  CHECK(shuffled(0, 1, 0).empty());
  const Lines lines(Ids(12, 3));
  Batches batches(lines.data, {.rows = 5, .seed = 5});
  CHECK(epoch_of(batches, 0) == std::vector<Ids>{{3, 6, 10, 9, 11}, {5, 2, 0, 7, 1}, {8, 4}});
  CHECK(joined(epoch_of(batches, 1)) == shuffled(12, 5, 1));
  Batches in_order(lines.data, {.rows = 5, .shuffle = false});
  CHECK(epoch_of(in_order, 7) == std::vector<Ids>{{0, 1, 2, 3, 4}, {5, 6, 7, 8, 9}, {10, 11}});
}

TEST_CASE("every permutation of a few is as frequent as another", "[batches]") {
  std::map<Ids, int> seen;
  for (uint64_t seed = 0; seed < 2400; ++seed) {
    ++seen[shuffled(4, seed, 0)];
  }
  CHECK(seen.size() == 24);
  for (const auto& [order, times] : seen) {
    CHECK(std::abs(times - 100) < 50);  // 5 standard deviations
  }
}

TEST_CASE("a batch is padded on the right to its longest example", "[batches]") {
  const Lines lines(id_line(0, 4, 2) + id_line(1, 2) + id_line(2, 5, 1));
  Batches batches(lines.data, {.rows = 2, .shuffle = false});
  const auto batch = batches.next();
  CHECK(at::equal(batch.ids, rows({{1, 101, 1, 101}, {2, 102, 0, 0}})));
  CHECK_FALSE(batch.first.defined());
  CHECK(at::equal(batch.scored, at::tensor(Ids{1, 2, 4}, at::kLong)));
  CHECK(at::equal(batch.targets, at::tensor(Ids{1, 101, 102}, at::kLong)));
  CHECK(batch.tokens == 6);
  CHECK(batch.examples == Ids{0, 1});
  const auto last = batches.next();
  CHECK(at::equal(last.ids, rows({{3, 103, 3, 103, 3}})));
  CHECK(at::equal(last.scored, at::tensor(Ids{3}, at::kLong)));
  CHECK(at::equal(last.targets, at::tensor(Ids{3}, at::kLong)));
  CHECK(batches.position() == BatchPosition{.epoch = 1});
}

TEST_CASE("a packed row is filled while examples fit whole", "[batches]") {
  const Lines lines(Ids{3, 4, 2, 6, 2, 7});
  Batches batches(lines.data, {.rows = 2, .max_tokens = 8, .pack = true, .shuffle = false});
  CHECK(batches.per_epoch(0) == 2);
  const auto batch = batches.next();
  CHECK(at::equal(batch.ids,
                  rows({{1, 101, 1, 2, 102, 2, 102, 0}, {3, 103, 4, 104, 4, 104, 4, 104}})));
  CHECK(at::equal(batch.first, rows({{0, 0, 0, 3, 3, 3, 3, 7}, {0, 0, 2, 2, 2, 2, 2, 2}})));
  CHECK(at::equal(batch.scored, at::tensor(Ids{1, 5, 8, 14}, at::kLong)));
  CHECK(at::equal(batch.targets, at::tensor(Ids{1, 102, 103, 104}, at::kLong)));
  CHECK(batch.tokens == 15);
  CHECK(batch.examples == Ids{0, 1, 2, 3});
  const auto last = batches.next();  // 2 + 7 do not fit
  CHECK(last.ids.sizes() == at::IntArrayRef{2, 7});
  CHECK_FALSE(last.first.defined());
  CHECK(last.examples == Ids{4, 5});
}

TEST_CASE("an epoch holds every example once", "[batches]") {
  const Lines lines(mixed_lengths(101));
  for (const bool pack : {false, true}) {
    CAPTURE(pack);
    Batches batches(lines.data, {.rows = 3, .max_tokens = 20, .pack = pack, .seed = 2});
    std::vector<Ids> orders;
    for (int64_t epoch = 0; epoch < 3; ++epoch) {
      const auto found = epoch_of(batches, epoch);
      CHECK(static_cast<int64_t>(found.size()) == batches.per_epoch(epoch));
      orders.push_back(joined(found));
      CHECK(orders.back() == shuffled(101, 2, epoch));
      auto sorted = orders.back();
      std::sort(sorted.begin(), sorted.end());
      CHECK(sorted == up_to(101));
    }
    CHECK(orders[0] != orders[1]);
  }
}

TEST_CASE("packed rows stay within their columns and waste little", "[batches]") {
  const Lines lines(mixed_lengths(101));
  Batches batches(lines.data, {.rows = 3, .max_tokens = 20, .pack = true, .seed = 2});
  int64_t tokens = 0, places = 0;
  for (auto left = batches.per_epoch(0); left > 0; --left) {
    const auto batch = batches.next();
    CHECK(batch.ids.size(1) <= 20);
    CHECK(batch.ids.count_nonzero().item<int64_t>() == batch.tokens);
    CHECK(batch.scored.numel() == static_cast<int64_t>(batch.examples.size()));
    CHECK(at::equal(batch.ids.flatten().index_select(0, batch.scored + 1), batch.targets));
    tokens += batch.tokens;
    places += batch.ids.numel();
  }
  CHECK(tokens == lines.data.tokens());
  CHECK(batches.position() == BatchPosition{.epoch = 1});
  CHECK(static_cast<double>(tokens) > 0.7 * static_cast<double>(places));
}

TEST_CASE("a seek goes on as if nothing had been between", "[batches]") {
  const Lines lines(mixed_lengths(23));
  for (const bool pack : {false, true}) {
    CAPTURE(pack);
    const BatchOptions options{.rows = 2, .max_tokens = 16, .pack = pack, .seed = 9};
    Batches batches(lines.data, options);
    for (int step = 0; step < 40; ++step) {
      Batches other(lines.data, options);
      other.seek(batches.position());
      for (int more = 0; more < 3; ++more) {
        Batches fresh(lines.data, options);
        fresh.seek(other.position());
        CHECK(same(other.next(), fresh.next()));
      }
      Batches again(lines.data, options);
      again.seek(batches.position());
      CHECK(same(batches.next(), again.next()));
      CHECK(batches.position() == again.position());
    }
    CHECK(batches.position().epoch >= 3);
  }
}

TEST_CASE("so many ranks see together what one sees alone", "[batches]") {
  const Lines lines(mixed_lengths(23));
  for (const bool pack : {false, true}) {
    for (const int64_t ranks : {2, 3, 16}) {  // 16: more than an epoch has when packed
      CAPTURE(pack, ranks);
      BatchOptions options{.rows = 2, .max_tokens = 16, .pack = pack, .seed = 9};
      Batches alone(lines.data, options);
      options.ranks = ranks;
      std::vector<Batches> together;
      for (options.rank = 0; options.rank < ranks; ++options.rank) {
        together.emplace_back(lines.data, options);
      }
      for (int step = 0; step < 20; ++step) {
        for (auto& one : together) {
          CHECK(one.upcoming() == alone.position());
          CHECK(same(one.next(), alone.next()));
        }
        for (auto& one : together) {
          CHECK(one.position() == alone.position());
        }
      }
      CHECK(alone.position().epoch >= 3);
      for (auto& one : together) {
        one.seek({.epoch = 1, .batch = 2});
      }
      alone.seek({.epoch = 1, .batch = 2});
      for (auto& one : together) {
        CHECK(same(one.next(), alone.next()));
      }
    }
  }
}

TEST_CASE("ranks beyond the batches of an epoch take those of the next", "[batches]") {
  const Lines lines(Ids{3, 3});
  Batches batches(lines.data, {.rows = 4, .seed = 3, .rank = 2, .ranks = 3});
  CHECK(batches.position() == BatchPosition{});
  CHECK(batches.upcoming() == BatchPosition{.epoch = 2});
  CHECK(batches.next().examples == shuffled(2, 3, 2));
  CHECK(batches.position() == BatchPosition{.epoch = 3});
  CHECK(batches.upcoming() == BatchPosition{.epoch = 5});
}

TEST_CASE("batches that cannot be are refused", "[batches]") {
  const Lines lines(Ids{3, 5, 4});
  const auto make = [&](const BatchOptions& options) {
    return error_of([&] { Batches(lines.data, options); });
  };
  CHECK(make({.rows = 0}) == "[batches] rows: expected at least 1, got 0");
  CHECK(make({.ranks = 0}) == "[batches] ranks: expected at least 1, got 0");
  CHECK(make({.rank = 2, .ranks = 2}) == "[batches] rank: expected 0 to 1, got 2");
  CHECK(make({.rank = -1}) == "[batches] rank: expected 0 to 0, got -1");
  for (const bool pack : {false, true}) {
    CHECK(make({.max_tokens = 4, .pack = pack}) ==
          "[batches] max_tokens: expected at least the 5 of the longest example, got 4");
    CHECK(make({.max_tokens = 5, .pack = pack}).empty());
  }
  Batches batches(lines.data, {.rows = 2});
  batches.next();
  const auto seek = [&](int64_t epoch, int64_t batch) {
    return error_of([&] { batches.seek({epoch, batch}); });
  };
  CHECK(seek(-1, 0) == "[batches] epoch: expected at least 0, got -1");
  CHECK(seek(3, -1) == "[batches] batch of epoch 3: expected 0 to 1, got -1");
  CHECK(seek(3, 2) == "[batches] batch of epoch 3: expected 0 to 1, got 2");
  CHECK(batches.position() == BatchPosition{.batch = 1});
}

TEST_CASE("a batch that could not be read is the next one still", "[batches]") {
  const Lines lines(Ids{3, 5, 4});
  Batches batches(lines.data, {.rows = 1});
  batches.next();
  const auto before = batches.position();
  const auto written = std::filesystem::last_write_time(lines.file.path);
  std::filesystem::last_write_time(lines.file.path, written + std::chrono::seconds(2));
  CHECK_THAT(error_of([&] { batches.next(); }), Catch::Contains("written to since"));
  CHECK(batches.position() == before);
  std::filesystem::last_write_time(lines.file.path, written);
  CHECK(batches.next().examples == Ids{shuffled(3, 0, 0)[1]});
}

TEST_CASE("an example in a packed or padded row is to the model as if alone", "[batches]") {
  const Lines lines(Ids{12, 5, 20, 11, 3, 9});  // the window is 8
  auto model = small_models().wide;
  const torch::NoGradGuard no_grad;
  for (const bool pack : {true, false}) {
    CAPTURE(pack);
    Batches batches(lines.data, {.rows = 2, .max_tokens = 32, .pack = pack, .shuffle = false});
    const auto batch = batches.next();
    REQUIRE(batch.first.defined() == pack);
    const auto together =
        model->hidden(batch.ids, training_placement(batch.ids, batch.first), nullptr);
    const auto unaware = model->hidden(batch.ids, training_placement(batch.ids, {}), nullptr);
    double furthest = 0, unaware_furthest = 0;
    int64_t row = 0, column = 0;
    for (const auto index : batch.examples) {
      const auto ids = at::tensor(lines.data.example(index).ids, at::kLong).unsqueeze(0);
      const auto length = ids.size(1);
      if (column > 0 && (!pack || column + length > 32)) {
        ++row;
        column = 0;
      }
      const auto alone = model->hidden(ids)[0];
      const auto difference = [&](const at::Tensor& x) {
        return max_difference(x[row].slice(0, column, column + length), alone);
      };
      furthest = std::max(furthest, difference(together));
      unaware_furthest = std::max(unaware_furthest, difference(unaware));
      column += length;
    }
    CHECK(furthest < kTolerance);
    CHECK((unaware_furthest > 0.1) == pack);
    CHECK(together.isfinite().all().item<bool>());
  }
}
