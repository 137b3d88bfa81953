#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <limits>

#include "gemma_torch/base/memory.h"
#include "gemma_torch/io/gguf_cursor.h"

namespace gemma_torch {
namespace {

constexpr uint32_t kMaxRank = 4;
struct Placed {
  GgufTensor tensor = {};
  std::string name = {};
  uint64_t offset = 0;  // in the data section
  uint64_t bytes = 0;
};

/// Torch's shape and the number of blocks, from the sizes as the file has them (row length first).
void set_shape(Placed& placed, const std::vector<uint64_t>& sizes, const std::string& file) {
  const auto& layout = *find_layout(static_cast<uint32_t>(placed.tensor.type));
  uint64_t values = 1;
  bool fits = true;
  for (const uint64_t size : sizes) {
    fits = fits && size >= 1 && !__builtin_mul_overflow(values, size, &values) &&
           values <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  }
  check(fits,
        "[gguf] {}: shape [{}] is empty or has more than 2^63 values ({})",
        printable(placed.name),
        fmt::join(sizes, ", "),
        file);
  const auto block = static_cast<uint64_t>(layout.values);
  check(sizes[0] % block == 0,
        "[gguf] {}: expected rows of a multiple of {} values for {}, got {} ({})",
        printable(placed.name),
        block,
        layout.name,
        sizes[0],
        file);
  placed.tensor.shape.assign(sizes.rbegin(), sizes.rend());
  placed.tensor.blocks = static_cast<int64_t>(values / block);
  check(!__builtin_mul_overflow(values / block, static_cast<uint64_t>(layout.bytes), &placed.bytes),
        "[gguf] {}: shape [{}] has more than 2^64 bytes ({})",
        printable(placed.name),
        fmt::join(sizes, ", "),
        file);
}

/// Sorted by offset, no two tensors may share a byte.
void check_overlap(std::vector<Placed>& all, const std::string& file) {
  std::sort(
      all.begin(), all.end(), [](const Placed& a, const Placed& b) { return a.offset < b.offset; });
  for (size_t i = 1; i < all.size(); ++i) {
    const uint64_t end = all[i - 1].offset + all[i - 1].bytes;
    check(all[i].offset >= end,
          "[gguf] {}: begins at {}, before {} ends at {} ({})",
          printable(all[i].name),
          all[i].offset,
          printable(all[i - 1].name),
          end,
          file);
  }
}

}  // namespace

void GgufFile::parse_tensors(Cursor& at, uint64_t count) {
  const uint64_t align = alignment();
  std::vector<Placed> all;
  for (uint64_t i = 0; i < count; ++i) {
    Placed placed;
    placed.name = at.read_string("a tensor name");
    const auto rank = at.read<uint32_t>("a rank");
    check(rank >= 1 && rank <= kMaxRank,
          "[gguf] {}: expected 1 to {} dimensions, got {} ({})",
          printable(placed.name),
          kMaxRank,
          rank,
          file_.name);
    std::vector<uint64_t> sizes;
    for (uint32_t d = 0; d < rank; ++d) {
      sizes.push_back(at.read<uint64_t>("a shape"));
    }
    const auto type = at.read<uint32_t>("a tensor type");
    check(
        find_layout(type) != nullptr,
        "[gguf] {}: tensor type {} is not supported; F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, "
        "Q4_K, Q5_K and Q6_K are ({})",
        printable(placed.name),
        type,
        file_.name);
    placed.tensor.type = static_cast<GgmlType>(type);
    placed.offset = at.read<uint64_t>("a tensor offset");
    set_shape(placed, sizes, file_.name);
    all.push_back(std::move(placed));
  }
  const size_t data_begin = (at.at + align - 1) / align * align;
  const size_t data_size = file_.size - std::min(file_.size, data_begin);
  for (auto& [tensor, name, offset, bytes] : all) {
    check(offset % align == 0 && offset <= data_size && bytes <= data_size - offset,
          "[gguf] {}: {} bytes at offset {} do not lie in the {} bytes of data at a multiple of {} "
          "({}). "
          "Hint: the file may be cut short",
          printable(name),
          bytes,
          offset,
          data_size,
          align,
          file_.name);
    tensor.data = file_.data + data_begin + offset;
  }
  check_overlap(all, file_.name);
  for (auto& placed : all) {
    check(tensors_.emplace(placed.name, std::move(placed.tensor)).second,
          "[gguf] {}: tensor appears twice ({})",
          printable(placed.name),
          file_.name);
  }
}

at::Tensor GgufFile::dequantize(const std::string& name, at::ScalarType dtype) const {
  const auto found = tensors_.find(name);
  check(found != tensors_.end(), "[gguf] {}: no such tensor ({})", printable(name), file_.name);
  check(dtype == at::kFloat || dtype == at::kBFloat16,
        "[gguf] {}: expected float32 or bfloat16, got {}",
        printable(name),
        c10::toString(dtype));
  const GgufTensor& tensor = found->second;
  const auto& layout = *find_layout(static_cast<uint32_t>(tensor.type));
  auto out = zeros_on_large_pages(tensor.shape, dtype);
  void* const to = out.data_ptr();
  constexpr int64_t kTile = 4096;  // weights: 16 KiB of floats, which stay in the first cache
  const int64_t tile_blocks = kTile / layout.values;
  at::parallel_for(0, tensor.blocks, tile_blocks * 4, [&](int64_t begin, int64_t end) {
    std::array<float, kTile> tile;
    for (int64_t block = begin; block < end; block += tile_blocks) {
      const int64_t blocks = std::min(tile_blocks, end - block);
      const std::byte* from = tensor.data + block * layout.bytes;
      const int64_t first = block * layout.values;
      if (dtype == at::kFloat) {
        dequantize_blocks(tensor.type, from, blocks, static_cast<float*>(to) + first);
      } else {
        dequantize_blocks(tensor.type, from, blocks, tile.data());
        round_to_bfloat16(tile.data(), blocks * layout.values, static_cast<uint16_t*>(to) + first);
      }
    }
  });
  return out;
}

}  // namespace gemma_torch
