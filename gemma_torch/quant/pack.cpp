#include "gemma_torch/quant/pack.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "gemma_torch/base/error.h"
#include "gemma_torch/base/memory.h"
#include "gemma_torch/quant/packed_linear.h"
#include "gemma_torch/quant/quantize.h"
#include "gemma_torch/quant/round_codes.h"

namespace gemma_torch {

using kernels::Bf16;
using kernels::Exception;
using kernels::Format;
using kernels::kBlockRows;
using kernels::kSliceColumns;
using kernels::Packed;

// One Linear, or two whose blocks come by turns.
struct Pack::Source {
  const char* name;  // of the first
  std::vector<LinearImpl*> parts;

  int64_t columns() const { return parts[0]->in_features; }
  int64_t slice() const { return slice_of(name, columns()); }
  int64_t rows() const { return static_cast<int64_t>(parts.size()) * parts[0]->out_features; }
};

namespace {

const PackedLinearImpl* as_packed(const LinearImpl* linear) {
  return dynamic_cast<const PackedLinearImpl*>(linear);
}

// One format for a matrix: that of its packed parts, or the one asked for.
Format format_of(const std::vector<LinearImpl*>& parts, Format asked) {
  const auto* first = as_packed(parts[0]);
  const auto format = first != nullptr ? first->packed().format : asked;
  for (const auto* part : parts) {
    const auto* packed = as_packed(part);
    check((packed != nullptr) == (first != nullptr) &&
              (packed == nullptr || packed->packed().format == format),
          "[pack] fc1 and fc2: expected one format, got two");
  }
  return format;
}

// A scan that lies in a file is read again with every token: it is copied.
ScanTensors on_large_pages(const ScanTensors& scan) {
  auto copy = scan;
  for (auto* tensor : {&copy.blocks, &copy.residuals}) {
    const auto mapped = *tensor;
    *tensor = zeros_on_large_pages(mapped.sizes(), at::kByte);
    tensor->copy_(mapped);
    drop_resident(mapped.const_data_ptr(), mapped.nbytes());
  }
  return copy;
}

std::string refuse_linear(const std::string& name, const LinearImpl& linear) {
  if (as_packed(&linear) != nullptr) {
    return {};
  }
  if (typeid(linear) != typeid(LinearImpl)) {
    return fmt::format("{} is a kind of Linear it does not know", name);
  }
  const auto& w = linear.weight;
  if (w.scalar_type() != at::kBFloat16 || !w.device().is_cpu() || !w.is_contiguous()) {
    return fmt::format("{}: it takes bfloat16 on the CPU, not {} on {}",
                       name,
                       c10::toString(w.scalar_type()),
                       w.device().str());
  }
  return {};
}

}  // namespace

std::string Pack::refusal(const Gemma3Model& given) {
  auto model = given;
  const auto& cfg = model->cfg;
  const auto multiple = [](const char* name, int64_t value, int64_t of) {
    return value % of == 0 ? std::string()
                           : fmt::format("{} {} is not a multiple of {}", name, value, of);
  };
  const auto heads = cfg.n_heads / cfg.n_kv_groups;
  for (const auto& reason :
       {multiple("emb_dim", cfg.emb_dim, kSliceColumns),
        multiple("hidden_dim", cfg.hidden_dim, kSliceColumns),
        multiple("head_dim", cfg.head_dim, 32),
        multiple("n_heads * head_dim", cfg.n_heads * cfg.head_dim, kSliceColumns),
        cfg.head_dim > kernels::kMaxHeadDim ? std::string("head_dim is above 512") : "",
        32 % heads != 0 ? fmt::format("{} queries to a key do not divide 32", heads) : "",
        can_scan(model) ? "" : std::string("the head is not bfloat16 on the CPU")}) {
    if (!reason.empty()) {
      return reason;
    }
  }
  std::string reason;
  model->for_each_linear([&](auto&, const std::string& name, Linear& linear) {
    if (reason.empty() && name != "out_head") {
      reason = refuse_linear(name, *linear);
    }
  });
  return reason;
}

Pack::Pack(Gemma3Model model, Format format) : model_(std::move(model)) {
  const auto reason = refusal(model_);
  check(reason.empty(),
        "[fused] expected a model that fits its kernels: {}. Hint: --engine eager",
        reason);
  check(format == Format::kLossless12 || format == Format::kInt8,
        "[pack] format: expected lossless12 or int8, got {}",
        kernels::format_name(format));
  const auto formats = packed_formats(model_);
  format_ = formats.empty() ? kernels::format_name(format) : recipe_name(formats);
  const auto* scanned = dynamic_cast<const ScannedHeadImpl*>(model_->out_head.get());
  scan_ = scanned != nullptr ? on_large_pages(scanned->scan) : make_scan(model_);
  for (const auto& weight : {model_->tok_emb->weight, model_->out_head->weight}) {
    remember(weight);
    drop_resident(weight.const_data_ptr(), weight.nbytes());  // few rows are needed from here on
  }
  std::vector<std::vector<Source>> sources;
  size_t bytes = 0;
  for (const auto& module : *model_->blocks) {
    auto& block = *module->as<TransformerBlockImpl>();
    auto& att = *block.att;
    auto& ff = *block.ff;
    sources.push_back({{"W_query", {att.W_query.get()}},
                       {"W_key", {att.W_key.get()}},
                       {"W_value", {att.W_value.get()}},
                       {"out_proj", {att.out_proj.get()}},
                       {"fc1", {ff.fc1.get(), ff.fc2.get()}},
                       {"fc3", {ff.fc3.get()}}});
    for (const auto& source : sources.back()) {
      const auto cells = source.rows() / kBlockRows * (source.columns() / source.slice());
      bytes += static_cast<size_t>(
          cells * kernels::cell_bytes(format_of(source.parts, format), source.slice()));
    }
  }
  arena_ = large_pages(bytes + 16'384);  // kernels ask for lines ahead of what they read
  size_t layer = 0;
  for (const auto& module : *model_->blocks) {
    auto& block = *module->as<TransformerBlockImpl>();
    const auto& from = sources[layer++];
    LayerPack pack{};
    pack.qkv = {add(from[0], format), add(from[1], format), add(from[2], format)};
    pack.out = add(from[3], format);
    pack.gate_up = add(from[4], format);
    pack.down = add(from[5], format);
    pack.input_norm = add_norm(block.input_layernorm->scale);
    pack.post_attn_norm = add_norm(block.post_attention_layernorm->scale);
    pack.pre_ff_norm = add_norm(block.pre_feedforward_layernorm->scale);
    pack.post_ff_norm = add_norm(block.post_feedforward_layernorm->scale);
    pack.q_norm = block.att->q_norm ? add_norm(block.att->q_norm->scale) : nullptr;
    pack.k_norm = block.att->k_norm ? add_norm(block.att->k_norm->scale) : nullptr;
    layers_.push_back(pack);
  }
  final_norm_ = add_norm(model_->final_norm->scale);
}

Packed Pack::add(const Source& source, Format asked) {
  Packed w;
  w.format = format_of(source.parts, asked);
  w.rows = source.rows();
  w.columns = source.columns();
  w.slice = source.slice();
  auto* cells = reinterpret_cast<uint8_t*>(arena_.get()) + arena_used_;
  w.cells = cells;
  const auto count = w.blocks() * w.slices();
  arena_used_ += static_cast<size_t>(count * w.stride());
  auto& exponents = exponents_.emplace_back(static_cast<size_t>(count));
  std::vector<std::vector<Exception>> found(static_cast<size_t>(w.blocks()));
  const auto encode = [&](int64_t cell, std::vector<Exception>& exceptions) {
    const auto parts = static_cast<int64_t>(source.parts.size());
    const auto* linear = source.parts[static_cast<size_t>(cell % w.blocks() % parts)];
    const auto block = cell % w.blocks() / parts;
    const auto slice = cell / w.blocks();
    auto* to = cells + cell * w.stride();
    if (const auto* packed = as_packed(linear)) {
      const auto from = packed->packed();
      std::memcpy(to,
                  from.cells + (slice * from.blocks() + block) * from.stride(),
                  static_cast<size_t>(w.stride()));
      return;
    }
    const auto* weight = static_cast<const Bf16*>(linear->weight.const_data_ptr());
    const Bf16* rows[kBlockRows];
    for (int64_t r = 0; r < kBlockRows; ++r) {
      rows[r] = weight + (block * kBlockRows + r) * w.columns + slice * w.slice;
    }
    if (w.format == Format::kLossless12) {
      exponents[static_cast<size_t>(cell)] =
          encode_lossless(rows, w.slice, to, exceptions, static_cast<uint32_t>(cell));
    } else {
      round_cell(rows, w.slice, to);
    }
  };
  // Block by block, each with all its slices: so the rows are read from end to end.
  at::parallel_for(0, w.blocks(), /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t slice = 0; slice < w.slices(); ++slice) {
        encode(slice * w.blocks() + block, found[static_cast<size_t>(block)]);
      }
    }
  });
  auto& exceptions = exceptions_.emplace_back();
  for (const auto& part : found) {
    exceptions.insert(exceptions.end(), part.begin(), part.end());
  }
  std::stable_sort(exceptions.begin(),
                   exceptions.end(),
                   [](const Exception& a, const Exception& b) { return a.cell < b.cell; });
  w.exponents = exponents.data();
  w.exceptions = exceptions.data();
  w.exception_count = static_cast<int64_t>(exceptions.size());
  layer_bytes_ += w.bytes();
  for (const auto* part : source.parts) {
    const auto* packed = as_packed(part);
    const auto& parameter = packed != nullptr ? packed->cells : part->weight;
    remember(parameter);
    drop_resident(parameter.const_data_ptr(), parameter.nbytes());
  }
  return w;
}

const float* Pack::add_norm(const torch::Tensor& weight) {
  const auto values = weight.detach().to(at::kCPU, at::kFloat) + 1.0;
  const auto* data = values.const_data_ptr<float>();
  norms_.emplace_back(data, data + values.numel());
  remember(weight);
  return norms_.back().data();
}

void Pack::remember(const torch::Tensor& parameter) {
  seen_.push_back({parameter, parameter.const_data_ptr(), parameter._version()});
}

bool Pack::is_current() const {
  return std::all_of(seen_.begin(), seen_.end(), [](const Seen& seen) {
    return seen.parameter.const_data_ptr() == seen.data &&
           seen.parameter._version() == seen.version;
  });
}

const Bf16* Pack::embedding() const {
  return static_cast<const Bf16*>(model_->tok_emb->weight.const_data_ptr());
}

const Bf16* Pack::head() const {
  return static_cast<const Bf16*>(model_->out_head->weight.const_data_ptr());
}

}  // namespace gemma_torch
