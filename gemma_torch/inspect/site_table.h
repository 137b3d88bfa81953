#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "gemma_torch/model/config.h"
#include "gemma_torch/model/probe.h"

namespace gemma_torch {

/// What a site is called elsewhere, N standing for the layer.
struct SiteInfo {
  Site site;
  std::string_view axes;                   // "B H T S", the letters of probe.h, outermost first
  std::string_view module;                 // of transformers' Gemma3ForCausalLM
  std::string_view tensor;                 // which of its tensors; what is done to its shape
  std::string_view transformer_lens = {};  // hook of a HookedTransformer; empty: it has none
  std::string_view difference = {};        // of what that hook sees; empty: same values and axes
};

/// One row for each site, in the order of the enum.
const std::array<SiteInfo, kSiteNames.size()>& site_table();

/// Whether every layer has this site; else there is one of it, whose layer is -1.
bool is_in_layers(Site site);

/// The site called by a name of probe.h, "resid_post"; nothing where there is none.
std::optional<Site> find_site(std::string_view name);

/// Place of the axis called by one of `letters` ("T", "HG") among the site's; -1 where it has none.
int64_t site_axis(Site site, std::string_view letters);

/// A site of a model.
struct SiteAt {
  Site site = Site::kEmbed;
  int64_t layer = -1;
  std::string name() const { return site_name(site, layer); }
};

/// Every site of a model of `n_layers`, in the order a token passes them.
std::vector<SiteAt> model_sites(int64_t n_layers);

/// Those of them whose name one of the globs matches: * any text, dots too, ? one character, [0-5]
/// one of a set.
/// Throws: Error naming a glob that matches none.
std::vector<SiteAt> match_sites(const std::vector<std::string>& globs, int64_t n_layers);

/// Sizes of the site's value for B rows of T tokens without a cache (S = T), in the order of its
/// axes.
std::vector<int64_t> site_shape(Site site, const Gemma3Config& cfg, int64_t B, int64_t T);

}  // namespace gemma_torch
