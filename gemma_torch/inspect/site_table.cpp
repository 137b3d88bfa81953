#include "gemma_torch/inspect/site_table.h"

#include <fnmatch.h>

#include <algorithm>
#include <map>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

constexpr std::string_view kNoWeight = "before the norm's weight";

constexpr std::array<SiteInfo, kSiteNames.size()> kTable = {{
    {Site::kEmbed, "B T E", "model.embed_tokens", "output", "hook_embed"},
    {Site::kResidPre, "B T E", "model.layers.N", "input", "blocks.N.hook_resid_pre"},
    {Site::kAttnIn,
     "B T E",
     "model.layers.N.input_layernorm",
     "output",
     "blocks.N.ln1.hook_normalized",
     kNoWeight},
    {Site::kQ,
     "B H T D",
     "model.layers.N.self_attn.q_norm",
     "output",
     "blocks.N.attn.hook_q",
     "B T H D, before q_norm"},
    {Site::kK,
     "B G T D",
     "model.layers.N.self_attn.k_norm",
     "output",
     "blocks.N.attn.hook_k",
     "B T G D, before k_norm"},
    {Site::kV,
     "B G T D",
     "model.layers.N.self_attn.v_proj",
     "output (B T G*D), heads apart",
     "blocks.N.attn.hook_v",
     "B T G D"},
    {Site::kRotQ,
     "B H T D",
     "model.layers.N.self_attn",
     "query of its eager_attention_forward",
     "blocks.N.attn.hook_rot_q",
     "B T H D"},
    {Site::kRotK,
     "B G T D",
     "model.layers.N.self_attn",
     "key of its eager_attention_forward",
     "blocks.N.attn.hook_rot_k",
     "B T G D"},
    {Site::kScores,
     "B H T S",
     "model.layers.N.self_attn",
     "query . key * scaling, before the mask",
     "blocks.N.attn.hook_attn_scores",
     "-inf where masked"},
    {Site::kPattern,
     "B H T S",
     "model.layers.N.self_attn",
     "output[1], eager attention",
     "blocks.N.attn.hook_pattern"},
    {Site::kZ,
     "B T H D",
     "model.layers.N.self_attn.o_proj",
     "input (B T H*D), heads apart",
     "blocks.N.attn.hook_z"},
    {Site::kAttnProj, "B T E", "model.layers.N.self_attn.o_proj", "output"},
    {Site::kAttnOut,
     "B T E",
     "model.layers.N.post_attention_layernorm",
     "output",
     "blocks.N.hook_attn_out"},
    {Site::kResidMid,
     "B T E",
     "model.layers.N.pre_feedforward_layernorm",
     "input",
     "blocks.N.hook_resid_mid"},
    {Site::kMlpIn,
     "B T E",
     "model.layers.N.pre_feedforward_layernorm",
     "output",
     "blocks.N.ln2.hook_normalized",
     kNoWeight},
    {Site::kGate, "B T F", "model.layers.N.mlp.gate_proj", "output", "blocks.N.mlp.hook_pre"},
    {Site::kUp, "B T F", "model.layers.N.mlp.up_proj", "output", "blocks.N.mlp.hook_pre_linear"},
    {Site::kMlpAct, "B T F", "model.layers.N.mlp.down_proj", "input", "blocks.N.mlp.hook_post"},
    {Site::kMlpProj, "B T E", "model.layers.N.mlp.down_proj", "output"},
    {Site::kMlpOut,
     "B T E",
     "model.layers.N.post_feedforward_layernorm",
     "output",
     "blocks.N.hook_mlp_out"},
    {Site::kResidPost, "B T E", "model.layers.N", "output", "blocks.N.hook_resid_post"},
    {Site::kFinalNorm, "B T E", "model.norm", "output", "ln_final.hook_normalized", kNoWeight},
    {Site::kLogits, "B T V", "lm_head", "output"},
}};

constexpr bool rows_follow_the_enum() {
  for (size_t i = 0; i < kTable.size(); ++i) {
    if (kTable[i].site != static_cast<Site>(i)) {
      return false;
    }
  }
  return true;
}
static_assert(rows_follow_the_enum());

std::string hint(int64_t n_layers) {
  std::string in_layers, others;
  for (const auto& row : kTable) {
    const auto name = kSiteNames[static_cast<size_t>(row.site)];
    auto& list = is_in_layers(row.site) ? in_layers : others;
    list += fmt::format("{}{}", list.empty() ? "" : ", ", name);
  }
  return fmt::format("{}, and of blocks.0 to blocks.{}: {}", others, n_layers - 1, in_layers);
}

}  // namespace

const std::array<SiteInfo, kSiteNames.size()>& site_table() {
  return kTable;
}

bool is_in_layers(Site site) {
  return site != Site::kEmbed && site != Site::kFinalNorm && site != Site::kLogits;
}

std::optional<Site> find_site(std::string_view name) {
  const auto found = std::find(kSiteNames.begin(), kSiteNames.end(), name);
  return found == kSiteNames.end() ? std::nullopt
                                   : std::optional(static_cast<Site>(found - kSiteNames.begin()));
}

int64_t site_axis(Site site, std::string_view letters) {
  // Every second character is a letter.
  const auto found = kTable[static_cast<size_t>(site)].axes.find_first_of(letters);
  return found == std::string_view::npos ? -1 : static_cast<int64_t>(found / 2);
}

std::vector<SiteAt> model_sites(int64_t n_layers) {
  std::vector<SiteAt> sites = {{Site::kEmbed}};
  for (int64_t layer = 0; layer < n_layers; ++layer) {
    for (const auto& row : kTable) {
      if (is_in_layers(row.site)) {
        sites.push_back({row.site, layer});
      }
    }
  }
  sites.push_back({Site::kFinalNorm});
  sites.push_back({Site::kLogits});
  return sites;
}

std::vector<SiteAt> match_sites(const std::vector<std::string>& globs, int64_t n_layers) {
  std::vector<bool> used(globs.size(), false);
  std::vector<SiteAt> matched;
  for (const auto& site : model_sites(n_layers)) {
    const auto name = site.name();
    bool wanted = false;
    for (size_t i = 0; i < globs.size(); ++i) {
      if (::fnmatch(globs[i].c_str(), name.c_str(), FNM_NOESCAPE) == 0) {
        wanted = used[i] = true;
      }
    }
    if (wanted) {
      matched.push_back(site);
    }
  }
  for (size_t i = 0; i < globs.size(); ++i) {
    if (!used[i]) {
      fail("[sites] expected names of sites, or globs that match some, got \"{}\". Hint: {}",
           globs[i],
           hint(n_layers));
    }
  }
  check(!globs.empty(), "[sites] expected at least one name or glob, got none");
  return matched;
}

std::vector<int64_t> site_shape(Site site, const Gemma3Config& cfg, int64_t B, int64_t T) {
  const std::map<char, int64_t> sizes = {{'B', B},
                                         {'T', T},
                                         {'S', T},
                                         {'E', cfg.emb_dim},
                                         {'H', cfg.n_heads},
                                         {'G', cfg.n_kv_groups},
                                         {'D', cfg.head_dim},
                                         {'F', cfg.hidden_dim},
                                         {'V', cfg.vocab_size}};
  std::vector<int64_t> shape;
  for (const char axis : kTable[static_cast<size_t>(site)].axes) {
    if (axis != ' ') {
      shape.push_back(sizes.at(axis));
    }
  }
  return shape;
}

}  // namespace gemma_torch
