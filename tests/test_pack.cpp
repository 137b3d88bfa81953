#include <ATen/Functions.h>

#include "gemma_torch/kernels/cpu/fused_kernels.h"
#include "gemma_torch/quant/pack.h"
#include "support/catch.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;
using kernels::Packed;

namespace {

// In a matrix of weights around 1, those too small for a code: in all its corners and along its diagonal.
void make_awkward(at::Tensor weight) {
  const auto rows = weight.size(0), columns = weight.size(1);
  weight.normal_(0, 1);
  for (int64_t r = 0; r < rows; ++r) {
    weight[r][(r * 5) % columns] = 1e-12 * static_cast<double>(r + 1);
  }
  for (const auto r : {int64_t{0}, rows - 1}) {
    for (const auto c : {int64_t{0}, columns - 1}) {
      weight[r][c] = 1e-20 * static_cast<double>(1 + r + c);
    }
  }
}

// What kernels read of a part: its products with unit vectors, (rows, columns).
at::Tensor read(const Packed& w) {
  const auto& kernel = kernels::fused_kernels(kernels::Isa::kGeneric);
  auto all = at::zeros({w.columns, w.rows});
  for (int64_t j = 0; j < w.columns; ++j) {
    std::vector<float> x(static_cast<size_t>(w.columns), 0.0F);
    x[static_cast<size_t>(j)] = 1;
    kernel.product(w,
                   {0, w.slices()},
                   {0, w.blocks()},
                   {1, x.data(), w.columns, nullptr},
                   all.mutable_data_ptr<float>() + j * w.rows,
                   w.rows);
  }
  return all.t();
}

at::Tensor read(const PackedParts& w) {
  std::vector<at::Tensor> parts;
  for (const auto& part : w.parts) {
    parts.push_back(read(part));
  }
  return at::cat(parts, w.cut == PackedParts::Cut::kRows ? 0 : 1);
}

at::Tensor by_turns(const at::Tensor& gate, const at::Tensor& up) {
  const auto blocks = [](const at::Tensor& w) { return w.reshape({-1, 1, 16, w.size(1)}); };
  return at::cat({blocks(gate), blocks(up)}, 1).reshape({-1, gate.size(1)});
}

}  // namespace

TEST_CASE("the parts of a pack are the model's weights, bit for bit, for any threads", "[pack]") {
  const torch::NoGradGuard no_grad;
  auto model = small_models().rounded;
  model->for_each_linear([](auto&, const std::string& name, Linear& linear) {
    if (name != "out_head") {
      make_awkward(linear->weight);
    }
  });
  for (const int threads : {1, 2, 3, 7}) {
    const Pack pack(model, kernels::Format::kLossless12, threads);
    int64_t l = 0, exceptions = 0;
    for (const auto& module : *model->blocks) {
      CAPTURE(threads, l);
      auto& block = *module->as<TransformerBlockImpl>();
      const auto& layer = pack.layers()[static_cast<size_t>(l++)];
      const auto same = [&](const PackedParts& got, const at::Tensor& want) {
        for (const auto& part : got.parts) {
          exceptions += part.exception_count;
        }
        REQUIRE(got.parts.size() == static_cast<size_t>(threads));
        CHECK(at::equal(read(got), want.to(at::kFloat)));
      };
      same(layer.qkv[0], block.att->W_query->weight);
      same(layer.qkv[1], block.att->W_key->weight);
      same(layer.qkv[2], block.att->W_value->weight);
      same(layer.out, block.att->out_proj->weight);
      same(layer.gate_up, by_turns(block.ff->fc1->weight, block.ff->fc2->weight));
      same(layer.down, block.ff->fc3->weight);
      for (size_t i = 0; i < layer.down.parts.size(); ++i) {
        CHECK(layer.gate_up.parts[i].rows == 2 * layer.down.parts[i].columns);
      }
    }
    CHECK(exceptions > 1000);
  }
}

TEST_CASE("a thread's parts follow one another in memory", "[pack]") {
  const auto model = small_models().rounded;
  const Pack pack(model, kernels::Format::kLossless12, 2);
  for (size_t i = 0; i < 2; ++i) {
    const uint8_t* end = pack.layers()[0].qkv[0].parts[i].exponents;
    for (const auto& layer : pack.layers()) {
      for (const auto* w :
           {&layer.qkv[0], &layer.qkv[1], &layer.qkv[2], &layer.out, &layer.gate_up, &layer.down}) {
        const auto& part = w->parts[i];
        CHECK(part.exponents - end >= 0);
        CHECK(part.exponents - end < 64);
        CHECK(part.cells - part.exponents >= part.blocks() * part.slices());
        CHECK(part.cells - part.exponents < part.blocks() * part.slices() + 64);
        end = part.cells + part.blocks() * part.slices() * part.stride();
      }
    }
  }
}

TEST_CASE("a row or column is found in its part, past empty ones", "[pack]") {
  PackedParts w;
  w.parts.resize(4);
  w.begin = {0, 64, 64, 128, 192};
  CHECK(w.part_of(0) == 0);
  CHECK(w.part_of(63) == 0);
  CHECK(w.part_of(64) == 2);
  CHECK(w.part_of(127) == 2);
  CHECK(w.part_of(128) == 3);
  CHECK(w.part_of(191) == 3);
  w.begin = {0, 0, 0, 64, 64};
  CHECK(w.part_of(0) == 2);
  CHECK(w.part_of(63) == 2);
}
