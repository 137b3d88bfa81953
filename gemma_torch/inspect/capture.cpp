#include "gemma_torch/inspect/capture.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/accumulate.h>

#include <algorithm>

#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/inspect/prompt_row.h"
#include "gemma_torch/inspect/site_table.h"
#include "gemma_torch/io/safetensors_writer.h"

namespace gemma_torch {
namespace {

using Prompts = std::vector<std::vector<int64_t>>;

// Rows of logits formed at a time: 64 of 262,144 float32 values are 64 MiB.
constexpr int64_t kHeadRows = 64;

struct Plan {
  std::vector<SiteAt> sites = {};  // in the order the model forms them
  c10::ScalarType save_dtype = c10::kFloat;
  bool numbered = false;

  std::string key(size_t prompt, const std::string& name) const {
    return numbered ? fmt::format("prompt.{}.{}", prompt, name) : name;
  }
};

void check_prompts(const Prompts& prompts, const Plan& plan, int64_t vocab_size) {
  check(!prompts.empty() && (plan.numbered || prompts.size() == 1),
        "[capture] prompts: expected {}, got {}",
        plan.numbered ? "at least one" : "one, or numbered keys",
        prompts.size());
  for (size_t n = 0; n < prompts.size(); ++n) {
    check(!prompts[n].empty(), "[capture] prompt {}: expected at least one id, got none", n);
    check_ids("capture", fmt::format("prompt {}", n), prompts[n], vocab_size);
  }
}

std::vector<TensorSpec> layout(const Plan& plan, const Prompts& prompts, const Gemma3Config& cfg) {
  std::vector<TensorSpec> specs;
  for (size_t n = 0; n < prompts.size(); ++n) {  // all ids first: the widest dtype
    specs.push_back({plan.key(n, "ids"), c10::kLong, {1, static_cast<int64_t>(prompts[n].size())}});
  }
  for (size_t n = 0; n < prompts.size(); ++n) {
    const auto T = static_cast<int64_t>(prompts[n].size());
    for (const auto& site : plan.sites) {
      specs.push_back(
          {plan.key(n, site.name()), plan.save_dtype, site_shape(site.site, cfg, /*B=*/1, T)});
    }
  }
  return specs;
}

Metadata describe(const Plan& plan, c10::ScalarType dtype, const Metadata& more) {
  Metadata metadata = {{"reference", "gemma_torch"},
                       {"dtype", dtype_name(dtype)},
                       {"save_dtype", dtype_name(plan.save_dtype)}};
  for (const auto& site : plan.sites) {
    const auto& row = site_table()[static_cast<size_t>(site.site)];
    metadata["axes." + site_name(site.site, /*layer=*/-1)] = row.axes;
  }
  metadata.insert(more.begin(), more.end());
  return metadata;
}

// Writes the sites of one prompt after another.
class Recorder {
 public:
  Recorder(const Plan& plan,
           SafetensorsWriter& writer,
           int64_t total,
           const CaptureOptions& options)
      : plan_(plan), writer_(writer), total_(total), options_(options) {}

  // A prompt that an earlier run wrote.
  void skip(const Gemma3Config& cfg, int64_t T, size_t prompt) {
    for (const auto& site : plan_.sites) {
      const auto shape = site_shape(site.site, cfg, /*B=*/1, T);
      writer_.skip(plan_.key(prompt, site.name()), c10::multiply_integers(shape));
    }
    done_ += static_cast<int64_t>(plan_.sites.size());
  }

  void run(Gemma3Model& model, const std::vector<int64_t>& ids, size_t prompt) {
    prompt_ = prompt;
    next_ = 0;
    const auto device = model->tok_emb->weight.device();
    const auto input = at::tensor(ids, at::kLong).unsqueeze(0).to(device);  // (1, T)
    const Probe probe = [&](const At& at, const at::Tensor& value) {
      visit(at, value, model->cfg);
      return value;
    };
    const auto x = model->hidden(input, /*cache=*/nullptr, probe);
    if (wants(Site::kLogits, -1)) {
      write_logits(model, x);
    }
  }

 private:
  bool wants(Site site, int64_t layer) const {
    return next_ < plan_.sites.size() && plan_.sites[next_].site == site &&
           plan_.sites[next_].layer == layer;
  }

  void visit(const At& at, const at::Tensor& value, const Gemma3Config& cfg) {
    if (!wants(at.site, at.layer)) {
      return;
    }
    const auto shape = site_shape(at.site, cfg, /*B=*/1, at.positions.size(0));
    check(value.sizes() == c10::IntArrayRef(shape),
          "[capture] {}: expected {}, the model gave {}",
          plan_.sites[next_].name(),
          shape_str(shape),
          shape_str(value.sizes()));
    write(value);
    finish();
  }

  // The head alone over a few rows: all rows of a long prompt would be the largest tensor by far.
  void write_logits(Gemma3Model& model, const at::Tensor& x) {
    for (int64_t start = 0; start < x.size(1); start += kHeadRows) {
      const auto rows = std::min(kHeadRows, x.size(1) - start);
      write(model->out_head(x.narrow(/*dim=*/1, start, rows)));
    }
    finish();
  }

  void write(const at::Tensor& value) {
    writer_.write(plan_.key(prompt_, plan_.sites[next_].name()), value.to(plan_.save_dtype));
  }

  void finish() {
    ++next_;
    ++done_;
    if (next_ == plan_.sites.size() && options_.on_prompt) {
      options_.on_prompt(static_cast<int64_t>(prompt_) + 1);
    }
    check(!options_.on_progress || options_.on_progress(done_, total_),
          "[capture] stopped after {} of {} tensors, {}",
          done_,
          total_,
          options_.kept_prompts ? "finished prompts are kept" : "no file was written");
  }

  const Plan& plan_;
  SafetensorsWriter& writer_;
  int64_t total_;
  const CaptureOptions& options_;
  size_t prompt_ = 0;
  size_t next_ = 0;  // of the plan's sites
  int64_t done_ = 0;
};

}  // namespace

CaptureReport capture(Gemma3Model model,
                      const Prompts& prompts,
                      const CaptureOptions& options,
                      const std::string& path) {
  const auto dtype = model->tok_emb->weight.scalar_type();
  // In bfloat16 as the eager engine runs, with its kernels for norms and angles. In float32 the modules' own operations,
  // which are transformers' bit for bit.
  const c10::InferenceMode inference(dtype == c10::kBFloat16);
  const at::NoGradGuard no_grad;  // which InferenceMode(false) has lifted
  const Plan plan{match_sites(options.sites, model->cfg.n_layers),
                  options.save_dtype.value_or(dtype),
                  options.numbered};
  check(plan.save_dtype == c10::kFloat || plan.save_dtype == c10::kBFloat16,
        "[capture] save_dtype: expected float32 or bfloat16, got {}",
        c10::toString(plan.save_dtype));
  check_prompts(prompts, plan, model->cfg.vocab_size);
  const auto kept = options.kept_prompts.value_or(0);
  const auto count = static_cast<int64_t>(prompts.size());
  check(
      kept >= 0 && kept <= count, "[capture] kept_prompts: expected 0 to {}, got {}", count, kept);
  CaptureReport report{.tensors = static_cast<int64_t>(prompts.size() * plan.sites.size())};
  SafetensorsWriter writer(path,
                           layout(plan, prompts, model->cfg),
                           describe(plan, dtype, options.metadata),
                           options.kept_prompts ? Unfinished::kKept : Unfinished::kRemoved);
  for (size_t n = 0; n < prompts.size(); ++n) {
    writer.write(plan.key(n, "ids"), at::tensor(prompts[n], at::kLong));
    report.tokens += static_cast<int64_t>(prompts[n].size());
  }
  Recorder recorder(plan, writer, report.tensors, options);
  for (size_t n = 0; n < prompts.size(); ++n) {
    if (static_cast<int64_t>(n) < kept) {
      recorder.skip(model->cfg, static_cast<int64_t>(prompts[n].size()), n);
    } else {
      recorder.run(model, prompts[n], n);
    }
  }
  writer.commit();
  report.bytes = writer.bytes();
  return report;
}

}  // namespace gemma_torch
