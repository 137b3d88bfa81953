#include "gemma_torch/inspect/sae.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <string_view>

#include "gemma_torch/base/error.h"
#include "gemma_torch/io/npy.h"
#include "gemma_torch/io/safetensors.h"

namespace gemma_torch {
namespace {

constexpr int64_t kMostActivations = int64_t{16} << 20;  // formed at a time: 64 MiB of float32

struct Name {
  std::string_view name, other;  // other: Gemma Scope 2's spelling
  at::Tensor Sae::* tensor;
};
constexpr std::array<Name, 6> kNames = {{{"W_enc", "w_enc", &Sae::W_enc},
                                         {"W_dec", "w_dec", &Sae::W_dec},
                                         {"b_enc", "b_enc", &Sae::b_enc},
                                         {"b_dec", "b_dec", &Sae::b_dec},
                                         {"threshold", "threshold", &Sae::threshold},
                                         {"W_skip", "affine_skip_connection", &Sae::W_skip}}};

void check_shape(const char* name,
                 const at::Tensor& tensor,
                 const std::vector<int64_t>& want,
                 const std::string& file) {
  check(tensor.sizes() == c10::IntArrayRef(want),
        "[sae] {}: {}: expected {}, got {}",
        file,
        name,
        shape_str(want),
        shape_str(tensor.sizes()));
}

void check_shapes(const Sae& sae, const std::string& file) {
  for (const auto& [name, other, member] : kNames) {
    check((sae.*member).defined() || name == "W_skip", "[sae] {}: {} is missing", file, name);
  }
  check(sae.W_enc.dim() == 2 && sae.W_enc.numel() > 0 && sae.W_dec.dim() == 2,
        "[sae] {}: expected W_enc (inputs, features) and W_dec (features, outputs), got {} and {}. "
        "Hint: one layer's autoencoder, not a cross-layer transcoder",
        file,
        shape_str(sae.W_enc.sizes()),
        shape_str(sae.W_dec.sizes()));
  const auto K = sae.features(), M = sae.outputs();
  check_shape("W_dec", sae.W_dec, {K, M}, file);
  check_shape("b_enc", sae.b_enc, {K}, file);
  check_shape("b_dec", sae.b_dec, {M}, file);
  check_shape("threshold", sae.threshold, {K}, file);
  if (sae.W_skip.defined()) {
    check_shape("W_skip", sae.W_skip, {sae.inputs(), M}, file);
  }
}

at::Tensor float_rows(const at::Tensor& x) {
  return x.to(at::kCPU, at::kFloat);
}

at::Tensor jump_relu(const at::Tensor& p, const at::Tensor& threshold) {
  return at::relu(p) * p.gt(threshold);
}

// Calls act with a few rows of x at a time.
template <typename Act>
void by_rows(const Sae& sae, const at::Tensor& x, Act act) {
  const auto step = std::max<int64_t>(1, kMostActivations / sae.features());
  for (int64_t start = 0; start < x.size(0); start += step) {
    act(x.narrow(/*dim=*/0, start, std::min(step, x.size(0) - start)));
  }
}

void check_site(const SiteAt& site, int64_t width, const char* end, const Gemma3Config& cfg) {
  const auto name = site.name();
  const bool in_layers = is_in_layers(site.site);
  check(in_layers ? site.layer >= 0 && site.layer < cfg.n_layers : site.layer == -1,
        "[sae] {}: layer: expected {}, got {}",
        name,
        in_layers ? fmt::format("0 to {}", cfg.n_layers - 1) : "-1",
        site.layer);
  const auto shape = site_shape(site.site, cfg, /*B=*/1, /*T=*/1);
  int64_t size = 1;
  for (const auto axis : shape) {
    size *= axis;
  }
  check(site_axis(site.site, "T") == 1,
        "[sae] {}: expected a site whose axes begin with B and T, got axes {}",
        name,
        site_table()[static_cast<size_t>(site.site)].axes);
  check(size == width, "[sae] {}: its width is {}, the {} has {}", name, size, end, width);
}

// Where a token meets a site: later ones have larger numbers.
int64_t order(const SiteAt& site, const Gemma3Config& cfg) {
  const auto place = static_cast<int64_t>(site.site);
  const auto layer = site.site == Site::kEmbed ? -1
                     : is_in_layers(site.site) ? site.layer
                                               : cfg.n_layers;
  return layer * static_cast<int64_t>(kSiteNames.size()) + place;
}

bool is_at(const SiteAt& site, const At& at) {
  return site.site == at.site && site.layer == at.layer;
}

// Remembers the input site's value until the pass comes to the output site.
template <typename Act>
Probe at_output(const SaeSites& sites, Act act) {
  return [sites, act, kept = std::make_shared<at::Tensor>()](const At& at, const at::Tensor& y) {
    if (is_at(sites.input, at)) {
      *kept = y;
    }
    if (!is_at(sites.output, at)) {
      return y;
    }
    const auto x = std::exchange(*kept, at::Tensor());
    check(x.defined(), "[sae] {}: met before {}", sites.output.name(), sites.input.name());
    return act(x, y);
  };
}

}  // namespace

at::Tensor Sae::encode(const at::Tensor& x) const {
  return jump_relu(at::matmul(float_rows(x), W_enc) + b_enc, threshold);
}

at::Tensor Sae::encode(const at::Tensor& x, const std::vector<int64_t>& features) const {
  const auto index = at::tensor(features, at::kLong);
  const auto p = at::matmul(float_rows(x), W_enc.index_select(/*dim=*/1, index));
  return jump_relu(p + b_enc.index_select(0, index), threshold.index_select(0, index));
}

at::Tensor Sae::reconstruct(const at::Tensor& x) const {
  auto sizes = x.sizes().vec();
  sizes.back() = outputs();
  const auto rows = float_rows(x).reshape({-1, inputs()});
  std::vector<at::Tensor> parts;
  by_rows(*this, rows, [&](const at::Tensor& some) {
    const auto out = at::addmm(b_dec, encode(some), W_dec);
    parts.push_back(W_skip.defined() ? at::addmm(out, some, W_skip) : out);
  });
  return at::cat(parts).view(sizes);
}

Sae make_sae(const TensorMap& tensors, const std::string& file) {
  Sae sae;
  for (const auto& [key, tensor] : tensors) {
    const auto found = std::find_if(kNames.begin(), kNames.end(), [&key = key](const Name& name) {
      return key == name.name || key == name.other;
    });
    check(found != kNames.end(),
          "[sae] {}: expected W_enc, W_dec, b_enc, b_dec, threshold and perhaps W_skip, got {}",
          file,
          printable(key));
    check(!(sae.*found->tensor).defined(), "[sae] {}: {} appears twice", file, found->name);
    check(at::isFloatingType(tensor.scalar_type()),
          "[sae] {}: {}: expected floats, got {}",
          file,
          key,
          c10::toString(tensor.scalar_type()));
    sae.*found->tensor = tensor.to(at::kFloat);
    check((sae.*found->tensor).isfinite().all().item<bool>(),
          "[sae] {}: {}: expected finite numbers",
          file,
          key);
  }
  check_shapes(sae, file);
  return sae;
}

Sae load_sae(const std::string& path) {
  const auto bytes = map_file(path);
  return make_sae(is_zip(bytes) ? read_npz(bytes) : read_safetensors(bytes), path);
}

void check_sae_sites(const Sae& sae, const SaeSites& sites, const Gemma3Config& cfg) {
  check_site(sites.input, sae.inputs(), "autoencoder's input", cfg);
  check_site(sites.output, sae.outputs(), "autoencoder's output", cfg);
  check(order(sites.input, cfg) <= order(sites.output, cfg),
        "[sae] output: expected {} or a later site, got {}",
        sites.input.name(),
        sites.output.name());
}

at::Tensor token_rows(const at::Tensor& value) {
  return value.flatten(/*start_dim=*/2);
}

Probe sae_probe(const Sae& sae,
                const SaeSites& sites,
                const SaeEdit& edit,
                const Gemma3Config& cfg) {
  check_sae_sites(sae, sites, cfg);
  std::vector<int64_t> features;
  std::vector<float> wanted;
  for (const auto& [feature, value] : edit.activations) {
    check(feature >= 0 && feature < sae.features(),
          "[sae] feature: expected 0 to {}, got {}",
          sae.features() - 1,
          feature);
    check(std::isfinite(value), "[sae] feature {}: expected a number, got {}", feature, value);
    features.push_back(feature);
    wanted.push_back(static_cast<float>(value));
  }
  const auto W_dec = sae.W_dec.index_select(0, at::tensor(features, at::kLong));
  const auto target = at::tensor(wanted, at::kFloat);
  const bool reconstruct = edit.reconstruct;
  return at_output(sites, [=](const at::Tensor& x, const at::Tensor& y) {
    const auto rows = token_rows(x);
    auto value = reconstruct ? sae.reconstruct(rows) : float_rows(token_rows(y));
    if (!features.empty()) {
      value = value + at::matmul(target - sae.encode(rows, features), W_dec);
    }
    return value.view(y.sizes()).to(y.options());
  });
}

TopFeatures top_features(const Sae& sae, const at::Tensor& x, int64_t k) {
  check(k >= 1, "[sae] top: expected at least 1, got {}", k);
  std::vector<at::Tensor> features, activations;
  by_rows(sae, x, [&](const at::Tensor& some) {
    const auto [values, ids] = sae.encode(some).topk(std::min(k, sae.features()));
    features.push_back(ids);
    activations.push_back(values);
  });
  return {at::cat(features), at::cat(activations)};
}

SaeFit fit_of(const Sae& sae, const at::Tensor& x, const at::Tensor& y) {
  const auto rows = float_rows(y);
  int64_t active = 0;
  by_rows(sae, x, [&](const at::Tensor& some) {
    active += sae.encode(some).count_nonzero().item<int64_t>();
  });
  const auto missed = (rows - sae.reconstruct(x)).to(at::kDouble).square().sum().item<double>();
  const auto spread = (rows - rows.mean(/*dim=*/0)).to(at::kDouble).square().sum().item<double>();
  return {.l0 = static_cast<double>(active) / static_cast<double>(x.size(0)),
          .explained = 1 - missed / spread};
}

}  // namespace gemma_torch
