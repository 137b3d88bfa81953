#include "gemma_torch/inspect/parity.h"

#include <ATen/ops/tensor.h>
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
  ModelOptions model = {};
  TextOptions text = {};
  std::string dump = {};
  int64_t steps = 16;
  bool json = false;
};

// What is compared with.
struct Reference {
  std::string name;
  TensorMap dump;
  Gemma3Model model{nullptr};  // null where all that is known of it is a dump
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

Reference read_dump(ParityFlags& flags) {
  const auto metadata = load_safetensors_metadata(flags.dump);
  if (flags.model.dtype == "auto") {
    flags.model.dtype = dump_dtype(metadata, flags.dump);
  }
  return {of(metadata, "reference"), load_safetensors(flags.dump), nullptr};
}

// The modules themselves, where rounding is least.
Reference run_reference(const ParityFlags& flags) {
  auto model = flags.model;
  model.device = "cpu";
  model.dtype = "float32";
  model.engine = "eager";
  const auto loaded = load(model);
  const auto ids = at::tensor(read_ids(flags.text, loaded.tokenizer), at::kLong).unsqueeze(0);
  return {"CPU float32 eager", dump_of(loaded.model, ids), loaded.model};
}

std::vector<SiteParity> compare(const Pretrained& loaded,
                                const ParityFlags& flags,
                                const Reference& reference) {
  const auto show = [&](const SiteParity& site) { flags.json ? void() : print_site(site); };
  std::vector<SiteParity> sites;
  const auto found = reference.dump.find("ids");
  check(found != reference.dump.end(), "[parity] {}: expected ids, got none", flags.dump);
  const auto& ids = found->second;
  const bool modules = flags.model.engine == "auto" || flags.model.engine == "eager";
  if (modules) {
    sites = compare_with_dump(loaded.model, reference.dump, show);
  }
  if (modules && !reference.model) {
    return sites;
  }
  auto model = flags.model;
  model.engine = modules ? "eager" : model.engine;
  const auto engine = make_engine(loaded, model, ids.numel() + flags.steps);
  const auto add = [&](SiteParity site) {
    show(site);
    sites.push_back(std::move(site));
  };
  if (!modules) {
    add(compare_logits(*engine, reference.dump));
  }
  if (reference.model) {
    add(compare_decode(*engine, reference.model, ids, flags.steps));
  }
  return sites;
}

void run_parity(ParityFlags flags) {
  const bool text = flags.text.prompt || flags.text.file || flags.text.ids;
  check(flags.dump.empty() == text,
        "[parity] expected a dump, or a text (-p, -f or --ids) to compare on with CPU float32 "
        "eager, got {}",
        text ? "both" : "neither");
  check(flags.steps >= 1, "[parity] -n: expected at least 1, got {}", flags.steps);
  const auto reference = flags.dump.empty() ? run_reference(flags) : read_dump(flags);
  const auto loaded = load(flags.model);
  const auto sites = compare(loaded, flags, reference);
  const auto failed =
      std::count_if(sites.begin(), sites.end(), [](auto& site) { return !site.ok(); });
  const auto tokens = reference.dump.at("ids").size(1);
  const auto dtype = dtype_name(loaded.config.dtype);
  const auto device = loaded.model->tok_emb->weight.device().str();
  if (flags.json) {
    print_json({{"ok", failed == 0},
                {"reference", reference.name},
                {"engine", flags.model.engine},
                {"device", device},
                {"dtype", dtype},
                {"tokens", tokens},
                {"sites", to_json(sites)}});
  } else {
    print_text(fmt::format("{} of {} sites equal {} within tolerance: {} tokens, {} on {}\n",
                           static_cast<int64_t>(sites.size()) - failed,
                           sites.size(),
                           reference.name,
                           tokens,
                           dtype,
                           device));
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
  auto* command = app.add_subcommand(
      "parity",
      "compare with a dump of the Python model, or with this one's modules in float32 on the CPU, "
      "site by site");
  auto flags = std::make_shared<ParityFlags>();
  command->add_option("dump", flags->dump, "safetensors file of tests/reference/dump_parity.py");
  add_model_flags(*command, flags->model);
  add_text_flags(*command, flags->text);
  command->get_option("--prompt")->description("without a dump: the text to compare on");
  command->get_option("--engine")
      ->description("auto and eager are compared at every site, the others at the logits");
  command->get_option("--dtype")->description(
      "auto (the dump's, else the checkpoint's), float32 or bfloat16");
  command
      ->add_option("-n,--steps",
                   flags->steps,
                   "without a dump: greedy tokens, each judged by the reference's logits")
      ->capture_default_str();
  command->add_flag("--json", flags->json, "one JSON object on standard output");
  command->callback([flags] { run_parity(*flags); });
}

}  // namespace gemma_torch::apps
