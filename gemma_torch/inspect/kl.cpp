#include "gemma_torch/inspect/kl.h"

#include <ATen/ops/tensor.h>
#include <c10/core/InferenceMode.h>

#include <charconv>

#include "gemma_torch/base/error.h"
#include "gemma_torch/inspect/prompt_row.h"
#include "gemma_torch/io/safetensors_writer.h"

namespace gemma_torch {
namespace {

// ln p = -(code / kCodes)^2: steps grow from next to nothing where p is near 1, which matters, to
// 1/512 where it is e^-64.
constexpr double kCodes = 8192;
constexpr int64_t kLargest = 65'535;

at::Tensor encode(at::Tensor log_p) {  // whose values are overwritten
  const auto codes = log_p.neg_().clamp_min_(0).sqrt_().mul_(kCodes).round_().clamp_max_(kLargest);
  return codes.to(at::kInt).to(at::kUInt16);
}

at::Tensor decode(const at::Tensor& codes) {
  return log_normalized(codes.to(at::kFloat).div_(kCodes).square_().neg_());
}

std::vector<int64_t> list_of(const at::Tensor& ids) {
  return {ids.const_data_ptr<int64_t>(), ids.const_data_ptr<int64_t>() + ids.numel()};
}

at::Tensor tensor_of(const TensorMap& tensors,
                     const std::string& name,
                     at::ScalarType dtype,
                     const std::string& path) {
  const auto found = tensors.find(name);
  check(found != tensors.end() && found->second.scalar_type() == dtype &&
            found->second.dim() == (name == "codes" ? 2 : 1),
        "[kl] {}: expected a file of `gemma kl save`, got one without its tensor {}",
        path,
        name);
  return found->second;
}

int64_t number_of(const Metadata& metadata, const std::string& name, const std::string& path) {
  const auto found = metadata.find(name);
  const auto text = found == metadata.end() ? "" : found->second;
  int64_t value = -1;
  const auto end = std::from_chars(text.data(), text.data() + text.size(), value).ptr;
  check(!text.empty() && end == text.data() + text.size() && value >= 0,
        "[kl] {}: {}: expected a number in the metadata, got \"{}\"",
        path,
        name,
        printable(text));
  return value;
}

// The tokens first .. first + count - 1 of the text, (count).
at::Tensor part_of(const std::vector<int64_t>& ids, int64_t first, int64_t count) {
  return at::tensor(
      at::ArrayRef<int64_t>(ids).slice(static_cast<size_t>(first), static_cast<size_t>(count)),
      at::kLong);
}

WindowOptions in_parts(WindowOptions options, int64_t skip = 0) {
  options.step = kDivergenceRows;
  options.skip = skip;
  return options;
}

}  // namespace

SavedReport save_distributions(Engine& engine,
                               const std::vector<int64_t>& ids,
                               const SaveOptions& options,
                               const std::string& path) {
  const c10::InferenceMode inference;
  const auto indices = scored_tokens(static_cast<int64_t>(ids.size()), options.windows);
  const auto P = static_cast<int64_t>(indices.size());
  Metadata header = {{"chunk", std::to_string(options.windows.chunk)},
                     {"bos_id", std::to_string(options.windows.bos_id)},
                     {"codes", "ln p = -(codes / 8192)^2"}};
  header.insert(options.metadata.begin(), options.metadata.end());
  SafetensorsWriter writer(path,
                           {{"ids", at::kLong, {static_cast<int64_t>(ids.size())}},
                            {"index", at::kLong, {P}},
                            {"codes", at::kUInt16, {P, engine.vocab_size()}}},
                           header,
                           options.from ? Unfinished::kKept : Unfinished::kRemoved);
  writer.write("ids", at::tensor(ids, at::kLong));
  writer.write("index", at::tensor(indices, at::kLong));
  auto part = options.from.value_or(SavedPart{});
  writer.skip("codes", part.positions * engine.vocab_size());
  const auto windows = in_parts(options.windows, part.positions);
  run_windows(engine, ids, windows, [&](int64_t first, int64_t count) {
    auto log_p = log_probabilities(engine);
    part.positions += count;
    part.log_prob += log_p.gather(/*dim=*/1, part_of(ids, first, count).unsqueeze(1))
                         .sum(at::kDouble)
                         .item<double>();
    writer.write("codes", encode(std::move(log_p)));
    if (options.on_part) {
      options.on_part(part);
    }
  });
  writer.commit();
  return {P, writer.bytes(), -part.log_prob / static_cast<double>(P)};
}

SavedDistributions::SavedDistributions(const std::string& path)
    : metadata_(load_safetensors_metadata(path)) {
  const auto tensors = load_safetensors(path);
  ids_ = list_of(tensor_of(tensors, "ids", at::kLong, path));
  codes_ = tensor_of(tensors, "codes", at::kUInt16, path);
  windows_.chunk = number_of(metadata_, "chunk", path);
  windows_.bos_id = number_of(metadata_, "bos_id", path);
  const auto index = list_of(tensor_of(tensors, "index", at::kLong, path));
  const auto expected = scored_tokens(static_cast<int64_t>(ids_.size()), windows_);
  check(index == expected && static_cast<int64_t>(index.size()) == codes_.size(0),
        "[kl] {}: expected the {} positions that windows of {} tokens give, got {} of {} rows",
        path,
        expected.size(),
        windows_.chunk,
        index.size(),
        codes_.size(0));
  check_ids("kl", path, ids_, vocab_size());
}

at::Tensor SavedDistributions::log_p(int64_t first, int64_t count) const {
  return decode(codes_.narrow(/*dim=*/0, first, count));
}

std::vector<PositionDivergence> compare_with_saved(
    Engine& engine,
    const SavedDistributions& saved,
    const std::function<void(int64_t, int64_t)>& on_progress) {
  const c10::InferenceMode inference;
  check(engine.vocab_size() == saved.vocab_size(),
        "[kl] vocabulary: expected {} tokens, as the file has, got {}",
        saved.vocab_size(),
        engine.vocab_size());
  std::vector<PositionDivergence> found;
  run_windows(engine, saved.ids(), in_parts(saved.windows()), [&](int64_t first, int64_t count) {
    const auto done = static_cast<int64_t>(found.size());
    const auto rows = diverge(
        saved.log_p(done, count), log_probabilities(engine), part_of(saved.ids(), first, count));
    found.insert(found.end(), rows.begin(), rows.end());
    if (on_progress) {
      on_progress(done + count, saved.positions());
    }
  });
  return found;
}

}  // namespace gemma_torch
