#include "gemma_torch/quant/pack.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>

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

namespace {

constexpr size_t kLine = 64;

size_t up_to_lines(int64_t bytes) {
  return (static_cast<size_t>(bytes) + kLine - 1) / kLine * kLine;
}

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

// What a part takes of its thread's stream: exponents, if any, then cells, each from a line of its own.
size_t exponent_bytes(const Packed& w) {
  return w.format == Format::kLossless12 ? up_to_lines(w.blocks() * w.slices()) : 0;
}
size_t part_bytes(const Packed& w) {
  return exponent_bytes(w) + up_to_lines(w.blocks() * w.slices() * w.stride());
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

size_t PackedParts::part_of(int64_t at) const {
  return static_cast<size_t>(std::upper_bound(begin.begin() + 1, begin.end() - 1, at) -
                             (begin.begin() + 1));
}

// One Linear, or two whose blocks come by turns, and its parts without their cells.
struct Pack::Source {
  std::vector<LinearImpl*> linears;
  PackedParts shared;

  Source(const char* name,  // of the first
         std::vector<LinearImpl*> given,
         Format asked,
         PackedParts::Cut cut,
         int64_t unit,  // rows or columns that stay together
         int threads)
      : linears(std::move(given)) {
    const bool by_rows = cut == PackedParts::Cut::kRows;
    shared.cut = cut;
    shared.columns = linears[0]->in_features;
    shared.rows = static_cast<int64_t>(linears.size()) * linears[0]->out_features;
    const auto units = (by_rows ? shared.rows : shared.columns) / unit;
    for (int64_t i = 0; i <= threads; ++i) {
      shared.begin.push_back(units * i / threads * unit);
    }
    for (size_t i = 0; i + 1 < shared.begin.size(); ++i) {
      const auto count = shared.begin[i + 1] - shared.begin[i];
      Packed part;
      part.format = format_of(linears, asked);
      part.rows = by_rows ? count : shared.rows;
      part.columns = by_rows ? shared.columns : count;
      part.slice = slice_of(name, shared.columns);
      shared.parts.push_back(part);
    }
  }
};

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

Pack::Pack(Gemma3Model model, Format format, int threads)
    : model_(std::move(model)), asked_(format) {
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
  std::vector<size_t> bytes(static_cast<size_t>(threads), 0);
  for (const auto& module : *model_->blocks) {
    auto& block = *module->as<TransformerBlockImpl>();
    auto& att = *block.att;
    auto& ff = *block.ff;
    auto& layer = sources.emplace_back();
    const auto share = [&](const char* name,
                           std::vector<LinearImpl*> linears,
                           PackedParts::Cut cut,
                           int64_t unit) {
      layer.emplace_back(name, std::move(linears), format, cut, unit, threads);
      for (size_t i = 0; i < bytes.size(); ++i) {
        bytes[i] += part_bytes(layer.back().shared.parts[i]);
      }
    };
    const auto by_rows = PackedParts::Cut::kRows, by_columns = PackedParts::Cut::kColumns;
    share("W_query", {att.W_query.get()}, by_rows, 2 * kBlockRows);
    share("W_key", {att.W_key.get()}, by_rows, 2 * kBlockRows);
    share("W_value", {att.W_value.get()}, by_rows, 2 * kBlockRows);
    share("out_proj", {att.out_proj.get()}, by_columns, kSliceColumns);
    share("fc1", {ff.fc1.get(), ff.fc2.get()}, by_rows, 2 * kSliceColumns);
    share("fc3", {ff.fc3.get()}, by_columns, kSliceColumns);
  }
  constexpr size_t kAhead = 16'384;  // kernels ask for lines ahead of what they read
  arena_ = large_pages(std::accumulate(bytes.begin(), bytes.end(), kAhead));
  auto* at = reinterpret_cast<uint8_t*>(arena_.get());
  for (const auto length : bytes) {
    streams_.push_back(at);
    at += length;
  }
  size_t layer = 0;
  for (const auto& module : *model_->blocks) {
    auto& block = *module->as<TransformerBlockImpl>();
    const auto& from = sources[layer++];
    LayerPack pack{};
    pack.qkv = {add(from[0]), add(from[1]), add(from[2])};
    pack.out = add(from[3]);
    pack.gate_up = add(from[4]);
    pack.down = add(from[5]);
    pack.input_norm = add_norm(block.input_layernorm->scale);
    pack.post_attn_norm = add_norm(block.post_attention_layernorm->scale);
    pack.pre_ff_norm = add_norm(block.pre_feedforward_layernorm->scale);
    pack.post_ff_norm = add_norm(block.post_feedforward_layernorm->scale);
    pack.q_norm = block.att->q_norm ? add_norm(block.att->q_norm->scale) : nullptr;
    pack.k_norm = block.att->k_norm ? add_norm(block.att->k_norm->scale) : nullptr;
    layers_.push_back(std::move(pack));
  }
  final_norm_ = add_norm(model_->final_norm->scale);
}

PackedParts Pack::add(const Source& source) {
  auto shared = source.shared;
  const bool by_rows = shared.cut == PackedParts::Cut::kRows;
  std::vector<uint8_t*> exponents, cells;  // of each part
  for (size_t i = 0; i < shared.parts.size(); ++i) {
    auto& part = shared.parts[i];
    exponents.push_back(streams_[i]);
    cells.push_back(streams_[i] + exponent_bytes(part));
    part.exponents = exponents.back();
    part.cells = cells.back();
    streams_[i] += part_bytes(part);
  }
  const auto slice = shared.parts[0].slice;
  const auto all_slices = shared.columns / slice;
  const auto linears = static_cast<int64_t>(source.linears.size());
  const auto threads = shared.parts.size();
  std::vector<std::vector<Exception>> found(static_cast<size_t>(shared.blocks()) * threads);
  const auto encode = [&](int64_t block, int64_t s) {
    const auto i = shared.part_of(by_rows ? block * kBlockRows : s * slice);
    const auto& part = shared.parts[i];
    const auto cell = by_rows ? s * part.blocks() + block - shared.begin[i] / kBlockRows
                              : (s - shared.begin[i] / slice) * part.blocks() + block;
    auto* to = cells[i] + cell * part.stride();
    const auto* linear = source.linears[static_cast<size_t>(block % linears)];
    const auto row = block / linears * kBlockRows;
    if (const auto* packed = as_packed(linear)) {
      const auto from = packed->packed();
      std::memcpy(to,
                  from.cells + (s * from.blocks() + row / kBlockRows) * from.stride(),
                  static_cast<size_t>(part.stride()));
      return;
    }
    const auto* weight = static_cast<const Bf16*>(linear->weight.const_data_ptr());
    const Bf16* rows[kBlockRows];
    for (int64_t r = 0; r < kBlockRows; ++r) {
      rows[r] = weight + (row + r) * shared.columns + s * slice;
    }
    if (part.format == Format::kLossless12) {
      exponents[i][cell] = encode_lossless(rows,
                                           slice,
                                           to,
                                           found[static_cast<size_t>(block) * threads + i],
                                           static_cast<uint32_t>(cell));
    } else {
      round_cell(rows, slice, to);
    }
  };
  // Block by block, each with all its slices: so the rows are read from end to end.
  at::parallel_for(0, shared.blocks(), /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t s = 0; s < all_slices; ++s) {
        encode(block, s);
      }
    }
  });
  for (size_t i = 0; i < threads; ++i) {
    auto& exceptions = exceptions_.emplace_back();
    for (size_t n = i; n < found.size(); n += threads) {
      exceptions.insert(exceptions.end(), found[n].begin(), found[n].end());
    }
    std::stable_sort(exceptions.begin(),
                     exceptions.end(),
                     [](const Exception& a, const Exception& b) { return a.cell < b.cell; });
    auto& part = shared.parts[i];
    part.exceptions = exceptions.data();
    part.exception_count = static_cast<int64_t>(exceptions.size());
    layer_bytes_ += part.bytes();
  }
  for (const auto* linear : source.linears) {
    const auto* packed = as_packed(linear);
    const auto& parameter = packed != nullptr ? packed->cells : linear->weight;
    remember(parameter);
    drop_resident(parameter.const_data_ptr(), parameter.nbytes());
  }
  return shared;
}

const float* Pack::add_norm(const torch::Tensor& weight) {
  const auto values = weight.detach().to(at::kCPU, at::kFloat) + 1.0;
  const auto* data = values.const_data_ptr<float>();
  norms_.emplace_back(data, data + values.numel());
  remember(weight);
  return norms_.back().data();
}

void Pack::remember(const torch::Tensor& parameter) {
  const auto& impl = *parameter.unsafeGetTensorImpl();
  seen_.push_back({parameter,
                   impl.unsafe_storage().data(),
                   impl.storage_offset(),
                   impl.version_counter().current_version()});
}

bool Pack::fits(const Gemma3Model& model, Format format, int threads) const {
  const bool all_packed = !packed_formats(model).empty();
  return model.get() == model_.get() && threads == this->threads() &&
         (all_packed || format == asked_);
}

bool Pack::is_current() const {
  // Asked before each token, when the weights have just passed through all caches: three objects for each parameter,
  // which a CPU fetches many at a time if nothing is called in between. 11 us on Zen 4; with Tensor's functions 18.
  bool same = true;
  for (const auto& seen : seen_) {
    const auto& impl = *seen.parameter.unsafeGetTensorImpl();
    same &= impl.unsafe_storage().data() == seen.storage;
    same &= impl.storage_offset() == seen.offset;
    same &= impl.version_counter().current_version() == seen.version;
  }
  return same;
}

const Bf16* Pack::embedding() const {
  return static_cast<const Bf16*>(model_->tok_emb->weight.const_data_ptr());
}

const Bf16* Pack::head() const {
  return static_cast<const Bf16*>(model_->out_head->weight.const_data_ptr());
}

}  // namespace gemma_torch
