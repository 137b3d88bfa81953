#include "gemma_torch/inspect/parity.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>

#include "common.h"
#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/io/safetensors.h"

namespace gemma_torch::apps {
namespace {

struct ParityFlags {
  ModelOptions model;
  std::string dump;
  bool json = false;
};

void print_site(const SiteParity& site) {
  const bool colour = is_terminal(STDOUT_FILENO);
  const char* mark = site.ok() ? (colour ? "\x1b[32m[OK]\x1b[0m" : "[OK]")
                               : (colour ? "\x1b[31m[FAIL]\x1b[0m" : "[FAIL]");
  print_text(
      fmt::format("{} {} max_abs={:.3g} mean_abs={:.3g} (values up to {:.4g}, allowed {:.2g})\n",
                  mark,
                  site.site,
                  site.max_abs,
                  site.mean_abs,
                  site.max_reference,
                  site.tolerance));
}

nlohmann::json to_json(const std::vector<SiteParity>& sites) {
  auto rows = nlohmann::json::array();
  for (const auto& site : sites) {
    rows.push_back({{"site", site.site},
                    {"max_abs", site.max_abs},
                    {"mean_abs", site.mean_abs},
                    {"max_reference", site.max_reference},
                    {"tolerance", site.tolerance},
                    {"ok", site.ok()}});
  }
  return rows;
}

std::string of(const Metadata& metadata, const std::string& key) {
  const auto found = metadata.find(key);
  return found == metadata.end() ? "" : found->second;
}

std::string dump_dtype(const Metadata& metadata, const std::string& dump) {
  auto dtype = of(metadata, "dtype");
  check(dtype == "float32" || dtype == "bfloat16",
        "[parity] {}: metadata dtype: expected float32 or bfloat16, got \"{}\". Hint: --dtype",
        dump,
        dtype);
  return dtype;
}

void run_parity(ParityFlags flags) {
  const auto metadata = load_safetensors_metadata(flags.dump);
  const auto dump = load_safetensors(flags.dump);
  if (flags.model.dtype == "auto") {
    flags.model.dtype = dump_dtype(metadata, flags.dump);
  }
  const auto loaded = load(flags.model);
  const auto show = [&](const SiteParity& site) { flags.json ? void() : print_site(site); };
  std::vector<SiteParity> sites;
  if (flags.model.engine == "auto" || flags.model.engine == "eager") {
    sites = compare_with_dump(loaded.model, dump, show);
  } else {
    check(dump.contains("ids"), "[parity] {}: expected ids, got none", flags.dump);
    const auto engine = make_engine(loaded, flags.model, dump.at("ids").numel());
    sites.push_back(compare_logits(*engine, dump));
    show(sites[0]);
  }
  const auto failed =
      std::count_if(sites.begin(), sites.end(), [](auto& site) { return !site.ok(); });
  const auto tokens = dump.at("ids").size(1);
  const auto dtype = dtype_name(loaded.config.dtype);
  if (flags.json) {
    print_json({{"ok", failed == 0},
                {"reference", of(metadata, "reference")},
                {"dtype", dtype},
                {"tokens", tokens},
                {"sites", to_json(sites)}});
  } else {
    print_text(fmt::format("{} of {} sites equal {} within tolerance: {} tokens, {}\n",
                           static_cast<int64_t>(sites.size()) - failed,
                           sites.size(),
                           of(metadata, "reference"),
                           tokens,
                           dtype));
  }
  const auto first =
      std::find_if(sites.begin(), sites.end(), [](auto& site) { return !site.ok(); });
  check(failed == 0,
        "[parity] {} of {} sites differ by more than their tolerance, the first of them {}",
        failed,
        sites.size(),
        failed == 0 ? "" : first->site);
}

}  // namespace

void add_parity(CLI::App& app) {
  auto* command =
      app.add_subcommand("parity", "compare with a dump of the Python model, site by site");
  auto flags = std::make_shared<ParityFlags>();
  command->add_option("dump", flags->dump, "safetensors file of tests/reference/dump_parity.py")
      ->required();
  add_model_flags(*command, flags->model);
  command->get_option("--engine")
      ->description("auto and eager are compared at every site, fused and traced at the logits");
  command->get_option("--dtype")->description("auto (the dump's), float32 or bfloat16");
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->callback([flags] { run_parity(*flags); });
}

}  // namespace gemma_torch::apps
