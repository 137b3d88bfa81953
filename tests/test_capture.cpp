#include "gemma_torch/inspect/capture.h"

#include <ATen/Functions.h>
#include <c10/core/CPUAllocator.h>
#include <sys/resource.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <filesystem>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/inspect/parity.h"
#include "gemma_torch/inspect/site_table.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/golden.h"
#include "support/scratch.h"
#include "support/small_models.h"

using namespace gemma_torch;
using namespace gemma_torch::test;

namespace {

std::vector<int64_t> some_ids(int64_t n) {
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < n; ++i) {
    ids.push_back((i * 37 + 5) % 1003);
  }
  return ids;
}

at::Tensor as_batch(const std::vector<int64_t>& ids) {
  return at::tensor(ids, at::kLong).unsqueeze(0);
}

/// What a probe sees at every site of a plain run.
TensorMap seen(Gemma3Model model, const std::vector<int64_t>& ids) {
  const torch::NoGradGuard no_grad;
  TensorMap values;
  const Probe probe = [&](const At& at, const at::Tensor& value) {
    values[site_name(at.site, at.layer)] = value.clone();
    return value;
  };
  model->forward(as_batch(ids), /*cache=*/nullptr, probe);
  return values;
}

std::vector<std::string> names(const std::vector<std::string>& globs, int64_t n_layers = 12) {
  std::vector<std::string> found;
  for (const auto& site : match_sites(globs, n_layers)) {
    found.push_back(site.name());
  }
  return found;
}

std::vector<std::string> keys(const TensorMap& tensors) {
  std::vector<std::string> found;
  for (const auto& [name, tensor] : tensors) {
    found.push_back(name);
  }
  return found;
}

/// The same numbers in the same dtype: equal() alone takes bfloat16 for float32.
bool same(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.equal(b);
}

/// Counts the bytes of CPU tensors alive, and the most there were.
class LiveBytes : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto* block = new Block{std::aligned_alloc(64, (bytes + 63) / 64 * 64), bytes};
    live += static_cast<int64_t>(bytes);
    most = std::max(most, live);
    return {block->data, block, &LiveBytes::release, at::Device(at::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  static inline int64_t live = 0, most = 0;

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    live -= static_cast<int64_t>(block->bytes);
    std::free(block->data);
    delete block;
  }
};

/// The most bytes of tensors alive at a time during `act`, beyond those before it.
template <typename Act>
int64_t most_alive(Act act) {
  static LiveBytes counting;
  auto* real = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&counting, /*priority=*/255);
  LiveBytes::most = LiveBytes::live;
  const auto before = LiveBytes::live;
  act();
  c10::SetCPUAllocator(real, /*priority=*/255);
  return LiveBytes::most - before;
}

}  // namespace

TEST_CASE("globs choose sites in the order a token passes them", "[capture]") {
  CHECK(names({"logits", "embed"}) == std::vector<std::string>{"embed", "logits"});
  CHECK(names({"blocks.1*.z"}) ==
        std::vector<std::string>{"blocks.1.z", "blocks.10.z", "blocks.11.z"});
  CHECK(names({"blocks.?.resid_p*"}, 2) == std::vector<std::string>{"blocks.0.resid_pre",
                                                                    "blocks.0.resid_post",
                                                                    "blocks.1.resid_pre",
                                                                    "blocks.1.resid_post"});
  CHECK(names({"blocks.[13].q", "blocks.3.*q"}) ==
        std::vector<std::string>{"blocks.1.q", "blocks.3.q", "blocks.3.rot_q"});
  CHECK(names({"*"}, 3).size() == 3 * 20 + 3);
  CHECK(names({"*", "embed"}, 3).size() == 3 * 20 + 3);  // each site once
}

TEST_CASE("a glob without a site is named, with the sites there are", "[capture]") {
  const auto error = error_of([] { names({"blocks.*.q", "blocks.*.resid_pots"}, 4); });
  CHECK_THAT(error,
             Catch::Contains("[sites]") && Catch::Contains("got \"blocks.*.resid_pots\"") &&
                 Catch::Contains("embed, final_norm, logits") &&
                 Catch::Contains("blocks.0 to blocks.3: resid_pre, attn_in, q, "));
  CHECK_THAT(error_of([] { names({"blocks.12.q"}); }), Catch::Contains("\"blocks.12.q\""));
  CHECK_THAT(error_of([] { names({""}); }), Catch::Contains("got \"\""));
  CHECK_THAT(error_of([] { names({}); }), Catch::Contains("at least one name or glob"));
}

TEST_CASE("every site is in the file as a probe sees it", "[capture]") {
  const ScratchFolder folder("gemma_capture");
  const auto model = small_models().wide;
  const auto ids = some_ids(21);  // the window is 8
  const auto report = capture(model, {ids}, {.sites = {"*"}}, folder / "x.safetensors");
  const auto file = load_safetensors(folder / "x.safetensors");
  const auto want = seen(model, ids);
  REQUIRE(file.size() == want.size() + 1);
  CHECK(file.at("ids").equal(as_batch(ids)));
  for (const auto& site : model_sites(model->cfg.n_layers)) {
    CAPTURE(site.name());
    const auto& value = file.at(site.name());
    CHECK(value.sizes() == at::IntArrayRef(site_shape(site.site, model->cfg, /*B=*/1, /*T=*/21)));
    CHECK(same(value, want.at(site.name())));
  }
  CHECK(report.tokens == 21);
  CHECK(report.tensors == static_cast<int64_t>(want.size()));
  CHECK(report.bytes == std::filesystem::file_size(folder / "x.safetensors"));
}

TEST_CASE("the header says what was run and the axes of each site", "[capture]") {
  const ScratchFolder folder("gemma_capture_header");
  const auto model = small_models().rounded;
  capture(model,
          {some_ids(3)},
          {.sites = {"blocks.*.pattern", "embed"},
           .save_dtype = at::kFloat,
           .metadata = {{"model", "small"}}},
          folder / "x.safetensors");
  CHECK(load_safetensors_metadata(folder / "x.safetensors") ==
        Metadata{{"reference", "gemma_torch"},
                 {"dtype", "bfloat16"},
                 {"save_dtype", "float32"},
                 {"axes.embed", "B T E"},
                 {"axes.pattern", "B H T S"},
                 {"model", "small"}});
}

TEST_CASE("values are stored in the dtype asked for", "[capture]") {
  const ScratchFolder folder("gemma_capture_dtype");
  const auto models = small_models();
  const auto ids = some_ids(5);
  const auto stored = [&](Gemma3Model model, std::optional<at::ScalarType> dtype) {
    capture(model, {ids}, {.sites = {"final_norm"}, .save_dtype = dtype}, folder / "x");
    return load_safetensors(folder / "x").at("final_norm");
  };
  const auto wide = seen(models.wide, ids).at("final_norm");
  const auto rounded = seen(models.rounded, ids).at("final_norm");
  CHECK(same(stored(models.wide, {}), wide));
  CHECK(same(stored(models.wide, at::kBFloat16), wide.to(at::kBFloat16)));
  CHECK(same(stored(models.rounded, {}), rounded));
  CHECK(same(stored(models.rounded, at::kFloat), rounded.to(at::kFloat)));
  CHECK_THAT(error_of([&] { stored(models.wide, at::kHalf); }),
             Catch::Contains("save_dtype: expected float32 or bfloat16, got Half"));
}

TEST_CASE("each of many prompts has keys of its own and the values of a run alone", "[capture]") {
  const ScratchFolder folder("gemma_capture_many");
  const auto model = small_models().wide;
  const std::vector<std::vector<int64_t>> prompts = {some_ids(9), {7}, some_ids(4)};
  const auto options = CaptureOptions{.sites = {"blocks.2.z", "logits"}, .numbered = true};
  const auto report = capture(model, prompts, options, folder / "x");
  CHECK(report.tokens == 14);
  CHECK(report.tensors == 6);
  const auto file = load_safetensors(folder / "x");
  CHECK(file.size() == 9);
  for (size_t n = 0; n < prompts.size(); ++n) {
    const auto want = seen(model, prompts[n]);
    const auto at = fmt::format("prompt.{}.", n);
    CHECK(file.at(at + "ids").equal(as_batch(prompts[n])));
    CHECK(file.at(at + "blocks.2.z").equal(want.at("blocks.2.z")));
    CHECK(file.at(at + "logits").equal(want.at("logits")));
  }
  capture(model, {prompts[2]}, options, folder / "one");
  CHECK(keys(load_safetensors(folder / "one")) ==
        std::vector<std::string>{"prompt.0.blocks.2.z", "prompt.0.ids", "prompt.0.logits"});
}

TEST_CASE("logits of more rows than the head takes at a time join without a seam", "[capture]") {
  const ScratchFolder folder("gemma_capture_logits");
  const auto model = small_models().wide;
  for (const int64_t T : {64, 65, 150}) {
    const auto ids = some_ids(T);
    capture(model, {ids}, {.sites = {"logits"}}, folder / "x");
    const auto got = load_safetensors(folder / "x").at("logits");
    REQUIRE(got.size(1) == T);
    CHECK(max_difference(got, seen(model, ids).at("logits")) < kFloatTolerance);
  }
}

TEST_CASE("a file of one prompt is a dump for parity", "[capture][parity]") {
  const ScratchFolder folder("gemma_capture_parity");
  const auto model = small_models().wide;
  capture(model, {some_ids(17)}, {.sites = {"*"}}, folder / "x");
  const auto sites = compare_with_dump(model, load_safetensors(folder / "x"));
  CHECK(sites.size() == 4 * 20 + 3);
  for (const auto& site : sites) {
    CAPTURE(site.site);
    CHECK(site.max_abs == 0);
  }
}

TEST_CASE("values go to the file as they are formed and are not kept", "[capture]") {
  const ScratchFolder folder("gemma_capture_memory");
  auto model = small_models().wide;
  const std::vector<std::vector<int64_t>> prompts(6, some_ids(48));
  const auto value_bytes = int64_t{48} * 128 * 4;  // of resid_post, (1, 48, 128) float32
  int64_t calls = 0;
  CaptureOptions options{.sites = {"blocks.*"}, .numbered = true};
  const auto run = [&] { capture(model, prompts, options, folder / "x"); };
  const auto plain = most_alive([&] {
    const torch::NoGradGuard no_grad;
    model->hidden(as_batch(prompts[0]));
  });
  const auto capturing = most_alive(run);
  const auto file_bytes = static_cast<int64_t>(std::filesystem::file_size(folder / "x"));
  CHECK(plain > 0);
  CHECK(file_bytes > 20 * plain);
  CHECK(capturing < plain + 8 * value_bytes);  // the largest value, gate, has 1.5 times as many
  std::filesystem::remove(folder / "x");
  options.sites = {"blocks.*.resid_post"};
  options.on_progress = [&](int64_t done, int64_t total) {
    CHECK(done == ++calls);
    CHECK(total == 24);
    const auto file = std::filesystem::directory_iterator(folder.path())->path();
    CHECK(file.filename().string().starts_with("x."));  // no file of that name yet
    CHECK(static_cast<int64_t>(std::filesystem::file_size(file)) > done * value_bytes);
    return true;
  };
  run();
  CHECK(calls == 24);
}

TEST_CASE("capturing that was cut anywhere goes on to the same bytes", "[capture]") {
  const ScratchFolder folder("gemma_capture_part");
  const auto path = folder / "x", part = part_path(path);
  const auto model = small_models().wide;
  const std::vector<std::vector<int64_t>> prompts = {some_ids(9), {7}, some_ids(70), {3, 4}};
  CaptureOptions options{.sites = {"blocks.2.z", "logits"}, .numbered = true};
  capture(model, prompts, options, folder / "whole");
  const auto bytes = read_file(folder / "whole");
  const auto run = [&] { return error_of([&] { capture(model, prompts, options, path); }); };
  int64_t kept = 0, tensors = 0;
  for (int64_t cut = 1; cut <= 8; ++cut) {  // tensors; 8: all but the file's name
    CAPTURE(cut);
    kept = tensors = 0;
    options.kept_prompts = 0;
    options.on_prompt = [&](int64_t n) { kept = n; };
    options.on_progress = [&](int64_t done, int64_t) { return done < cut; };
    CHECK_THAT(run(), Catch::Contains("tensors, finished prompts are kept"));
    CHECK(kept == cut / 2);
    CHECK_FALSE(std::filesystem::exists(path));
    if (cut % 2 == 1) {  // what a killed process had begun to write
      std::filesystem::resize_file(part, std::filesystem::file_size(part) - 5);
    }
    options.kept_prompts = kept;
    options.on_progress = [&](int64_t, int64_t) { return ++tensors > 0; };
    CHECK(run() == "");
    CHECK(tensors == 8 - 2 * (cut / 2));  // finished prompts are not run again
    CHECK(read_file(path) == bytes);
    CHECK_FALSE(std::filesystem::exists(part));
    std::filesystem::remove(path);
  }
  options.kept_prompts = 5;
  CHECK_THAT(run(), Catch::Contains("[capture] kept_prompts: expected 0 to 4, got 5"));
  options.kept_prompts = 1;  // of which there is nothing
  CHECK_THAT(run(), Catch::Contains(part) && Catch::Contains("Hint: remove it to start anew"));
}

TEST_CASE("what cannot be captured leaves no file", "[capture]") {
  const ScratchFolder folder("gemma_capture_errors");
  auto model = small_models().wide;
  const auto error = [&](const std::vector<std::vector<int64_t>>& prompts, CaptureOptions options) {
    const auto message = error_of([&] { capture(model, prompts, options, folder / "x"); });
    CHECK(std::filesystem::is_empty(folder.path()));
    return message;
  };
  const CaptureOptions one{.sites = {"blocks.*.gate"}};
  const CaptureOptions many{.sites = {"embed"}, .numbered = true};
  CHECK_THAT(error({{1}}, {.sites = {"nothing"}}), Catch::Contains("got \"nothing\""));
  CHECK_THAT(error({{1}, {}}, many), Catch::Contains("prompt 1: expected at least one id"));
  CHECK_THAT(error({{1, 1003}}, one), Catch::Contains("expected ids from 0 to 1002, got 1003"));
  CHECK_THAT(error({{1}, {5, -1}}, many),
             Catch::Contains("prompt 1: ") && Catch::Contains("got -1"));
  CHECK_THAT(error({{1}, {2}}, one), Catch::Contains("expected one, or numbered keys, got 2"));
  CHECK_THAT(error({}, many), Catch::Contains("expected at least one, got 0"));
  auto stopped = one;
  stopped.on_progress = [](int64_t done, int64_t) { return done < 3; };
  CHECK_THAT(error({some_ids(4)}, stopped), Catch::Contains("stopped after 3 of 4 tensors"));
  model->cfg.hidden_dim = 7;  // a model that was changed, and its config not
  CHECK_THAT(error({{1, 2}}, one),
             Catch::Contains("blocks.0.gate: expected (1, 2, 7), the model gave (1, 2, 192)"));
  CHECK_THAT(error_of([&] { capture(model, {{1}}, one, folder / "no/x"); }),
             Catch::Contains("no/x"));
}

TEST_CASE("a full disk is an error and leaves no file", "[capture]") {
  const ScratchFolder folder("gemma_capture_full");
  const auto model = small_models().wide;
  rlimit before = {};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);  // write() fails instead
  const rlimit small = {65'536, before.rlim_max};
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  const auto message =
      error_of([&] { capture(model, {some_ids(40)}, {.sites = {"*"}}, folder / "x"); });
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  CHECK_THAT(message, Catch::Contains("[write]") && Catch::Contains("/x: File too large"));
  CHECK(std::filesystem::is_empty(folder.path()));
}
