#include "from_scratch.h"

#include <filesystem>

#include "fingerprint.h"
#include "gemma_torch/adapt/new_model.h"
#include "gemma_torch/adapt/text_windows.h"
#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"

namespace gemma_torch::apps {
namespace {

namespace fs = std::filesystem;

void make_folder(const std::string& path) {
  std::error_code reason;
  fs::create_directories(path, reason);
  check(!reason, "[finetune] {}: {}", path, reason.message());
}

Gemma3Config config_of(const FinetuneFlags& flags) {
  const fs::path path(flags.from_scratch);
  const auto folder = path.parent_path().string();
  const auto json = read_json(folder.empty() ? "." : folder, path.filename().string());
  check(!json.is_null(), "[finetune] --from-scratch: {}: no such file", flags.from_scratch);
  try {
    auto cfg = parse_config(json);
    cfg.dtype = parse_dtype(flags.model.dtype, cfg.dtype);
    return cfg;
  } catch (const Error& error) {
    fail("{} ({})", error.what(), flags.from_scratch);
  }
}

}  // namespace

std::string make_initial(const FinetuneFlags& flags) {
  const auto path = flags.run.out + "/initial";
  const auto model = new_model(config_of(flags), *flags.seed);
  if (fs::exists(path)) {
    check(fingerprint(load_pretrained(path).model) == fingerprint(model),
          "[finetune] {}: expected the weights that the run began with, got another --from-scratch "
          "or --seed. Hint: go on with the same flags, or begin another --out",
          path);
    const auto file = path + "/tokenizer.model";
    check((fs::exists(file) ? read_file(file) : "") == tokenizer_model(flags.tokenizer),
          "[finetune] {}: expected the --tokenizer that the run began with, got another. Hint: go "
          "on with the same flags, or begin another --out",
          path);
    return path;
  }
  make_folder(flags.run.out);
  AtomicFolder out(path);
  write_new_model(model, flags.tokenizer, out);
  out.commit();
  int64_t count = 0;
  for (const auto& parameter : model->parameters()) {
    count += parameter.numel();
  }
  fmt::print(stderr, "gemma: {}: a new model of {:.2f} million parameters\n", path, count / 1e6);
  return path;
}

std::string make_windows(const FinetuneFlags& flags,
                         const Pretrained& loaded,
                         const std::string& path,
                         const std::string& name) {
  check(loaded.tokenizer.has_value(),
        "[finetune] --plain-text: expected a model with a tokenizer, got one without. Hint: "
        "--tokenizer with --from-scratch");
  make_folder(flags.run.out);
  const auto out = flags.run.out + "/" + name;
  Progress progress(path + ": MB cut");
  const auto show = [&](int64_t done, int64_t total) {
    progress.show(done >> 20, total >> 20);
    check(!interrupted(), "[finetune] stopped while {} was read", path);
  };
  write_text_windows(
      path, *loaded.tokenizer, out, {.max_tokens = flags.examples.max_tokens, .on_progress = show});
  return out;
}

}  // namespace gemma_torch::apps
