// count_kernels [--list]: how many kernels one decoded token of Gemma 3 270M starts on a device, and what that and the
// bytes of its weights make of a token's time there. Counted on the CPU, in the forms that run on a device: each operation
// that is no view, makes no memory and calls no other is one kernel. A product may start a second one.
#include <ATen/Functions.h>
#include <ATen/record_function.h>
#include <fmt/format.h>

#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "gemma_torch/engine/device_sampler.h"
#include "gemma_torch/engine/eager.h"
#include "gemma_torch/model/inference.h"

using namespace gemma_torch;

namespace {

const std::set<std::string> kNoKernel{
    "aten::empty",        "aten::empty_strided",  "aten::empty_like",
    "aten::as_strided",   "aten::view",           "aten::select",
    "aten::narrow",       "aten::slice",          "aten::t",
    "aten::transpose",    "aten::unsqueeze",      "aten::squeeze",
    "aten::expand",       "aten::detach",         "aten::alias",
    "aten::permute",      "aten::reshape",        "aten::unflatten",
    "aten::flatten",      "aten::_reshape_alias", "aten::contiguous",
    "aten::to",           "aten::result_type",    "aten::_unsafe_view",
    "aten::resize_",      "aten::expand_as",      "aten::view_as",
    "aten::resolve_conj", "aten::resolve_neg"};

// One kernel each on a device, whatever the CPU makes of them: sums with their divisions, numbers widened on the way.
const std::set<std::string> kOneKernel{"aten::mean",
                                       "aten::sum",
                                       "aten::rms_norm",
                                       "aten::mul",
                                       "aten::add",
                                       "aten::sub",
                                       "aten::div",
                                       "aten::where",
                                       "aten::arange",
                                       "aten::full",
                                       "aten::zeros",
                                       "aten::index_copy_"};

struct Call : at::ObserverContext {
  std::string name;
  bool one = false;        // part of a call that is one kernel
  bool has_child = false;  // that is a kernel
  Call* parent = nullptr;
};

Call* current = nullptr;
std::map<std::string, int64_t> kernels;

std::unique_ptr<at::ObserverContext> on_start(const at::RecordFunction& function) {
  auto call = std::make_unique<Call>();
  call->parent = current;
  call->one = current != nullptr && (current->one || kOneKernel.contains(current->name));
  call->name = function.name();
  if (current != nullptr && !kNoKernel.contains(call->name)) {
    current->has_child = true;
  }
  current = call.get();
  return call;
}

void on_end(const at::RecordFunction&, at::ObserverContext* context) {
  const auto* call = static_cast<Call*>(context);
  current = call->parent;
  const bool whole = kOneKernel.contains(call->name);
  if (!call->one && (whole || !call->has_child) && !kNoKernel.contains(call->name)) {
    ++kernels[call->name];
  }
}

int64_t counted(const std::function<void()>& work) {
  kernels.clear();
  const auto handle = at::addGlobalCallback(at::RecordFunctionCallback(on_start, on_end));
  work();
  at::removeCallback(handle);
  int64_t count = 0;
  for (const auto& [name, times] : kernels) {
    count += times;
  }
  return count;
}

void print_list() {
  for (const auto& [name, times] : kernels) {
    fmt::print("  {:<28} {:>5}\n", name, times);
  }
}

struct Gpu {
  const char* name;
  double bytes_per_second;  // that a kernel which only reads reaches
};

// Of a token that `count` kernels make, each of which costs `least` to `most` seconds besides what it reads.
void print_time(const char* how, double least, double most, int64_t count, int64_t bytes) {
  for (const Gpu& gpu : {Gpu{"A100", 1.7e12}, Gpu{"H100", 3.0e12}}) {
    const auto seconds = [&](double each) {
      return static_cast<double>(count) * each + static_cast<double>(bytes) / gpu.bytes_per_second;
    };
    fmt::print("{:<6} {:<4} {:>5.2f} to {:.2f} ms a token, {:.0f} to {:.0f} tok/s\n",
               how,
               gpu.name,
               seconds(least) * 1e3,
               seconds(most) * 1e3,
               1 / seconds(most),
               1 / seconds(least));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const torch::NoGradGuard no_grad;
  Gemma3Config config;  // of Gemma 3 270M
  config.dtype = at::kBFloat16;
  Gemma3Model model(config, c10::kCPU, Init::kNone);
  model->tie_weights();
  KvCache cache(config, {.capacity = 1024, .device = c10::kCPU, .fixed = true});
  const auto index = at::TensorOptions(at::kLong).device(c10::kCPU);
  const auto token = at::zeros({1, 1}, index);
  const auto position = at::zeros({1}, index);
  const auto places = at::zeros({1}, index.dtype(at::kDouble));
  const bool list = argc > 1 && std::strcmp(argv[1], "--list") == 0;

  const auto written = counted([&] {
    const auto x = model->hidden(token, cache.place(position), &cache);
    model->out_head(x).to(at::kFloat);
  });
  const auto logits = at::rand({1, config.vocab_size});
  fmt::print("kernels of a pass of one token, head included: {}\n", written);
  if (list) {
    print_list();
  }
  // On CUDA the norms run through LibTorch's fused one, which this device has not.
  const auto x = at::rand({1, 1, config.emb_dim}).to(config.dtype);
  const auto norm = counted([&] { model->final_norm(x); });
  const auto fused = counted([&] { rms_norm_fused(x, model->final_norm->scale, 1e-6); });
  const auto norms = 6 * config.n_layers + 1;
  const auto forward = written - norms * (norm - fused);
  fmt::print("with fused norms, {} kernels each for {}: {}\n", fused, norm, forward);
  const auto choice = [&](const char* name, const Sampling& sampling) {
    const DeviceSampler sampler(sampling, 1, config.vocab_size, c10::kCPU);
    fmt::print(
        "kernels of a choice, {}: {}\n", name, counted([&] { sampler.choose(logits, places); }));
    if (list) {
      print_list();
    }
  };
  choice("greedy", {.temperature = 0});
  choice("top-k 64, top-p 0.95", {.temperature = 1, .top_k = 64, .top_p = 0.95});

  const auto bytes = step_bytes(model) + cache.bytes();
  fmt::print("bytes of a token: {:.0f} MB\n", static_cast<double>(bytes) / 1e6);
  // The host takes 4 to 6 us to start a kernel through LibTorch; one within a replayed graph costs 1 to 2 us.
  print_time("eager", 4e-6, 6e-6, forward + 1, bytes);
  print_time("graph", 1e-6, 2e-6, forward + 8, bytes);
  return 0;
}
