#include <filesystem>
#include <set>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/io/safetensors.h"
#include "gemma_torch/io/strict_json.h"

namespace gemma_torch {
namespace {

constexpr size_t kMaxIndex = size_t{64} << 20;  // bytes; a real one has about 100 a tensor
constexpr int kIndexDepth = 8;                  // weight_map needs 2; "metadata" is free

/// name -> shard, both strings, the shard a plain file name: an index must not reach out of its
/// folder.
std::map<std::string, std::string> weight_map(const std::string& index_path) {
  const auto root = parse_strict_json(read_file(index_path, kMaxIndex), kIndexDepth, index_path);
  check(root.is_object() && root.contains("weight_map") && root["weight_map"].is_object(),
        "[load_sharded] {}: expected an object \"weight_map\"",
        index_path);
  std::map<std::string, std::string> shard_of;
  for (const auto& [name, shard] : root["weight_map"].items()) {
    const auto text = shard.is_string() ? shard.get<std::string>() : std::string();
    const std::filesystem::path file(text);
    check(!text.empty() && text.find('\0') == std::string::npos && file == file.filename() &&
              text != "." && text != "..",
          "[load_sharded] {}: expected a plain file name, got {} ({})",
          printable(name),
          printable(shard.dump()),
          index_path);
    shard_of[name] = text;
  }
  return shard_of;
}

}  // namespace

TensorMap load_sharded_safetensors(const std::string& index_path) {
  const auto shard_of = weight_map(index_path);
  std::set<std::string> shards;
  for (const auto& [name, shard] : shard_of) {
    shards.insert(shard);
  }
  TensorMap tensors;
  const auto folder = std::filesystem::path(index_path).parent_path();
  for (const auto& shard : shards) {
    for (auto& [name, tensor] : load_safetensors(folder / shard)) {
      const auto found = shard_of.find(name);
      check(found != shard_of.end() && found->second == shard,
            "[load_sharded] {}: in shard {}, the index says {} ({})",
            printable(name),
            printable(shard),
            found == shard_of.end() ? "nothing of it" : printable(found->second),
            index_path);
      tensors.emplace(name, tensor);
    }
  }
  for (const auto& [name, shard] : shard_of) {
    check(tensors.contains(name),
          "[load_sharded] {}: expected in shard {}, which lacks it ({})",
          printable(name),
          printable(shard),
          index_path);
  }
  return tensors;
}

}  // namespace gemma_torch
