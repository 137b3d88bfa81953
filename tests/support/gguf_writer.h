#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

/// Writes small GGUF files, true ones and, with a count or an offset overwritten, lying ones.
class GgufWriter {
 public:
  // Value types of the format.
  static constexpr uint32_t kU32 = 4, kI32 = 5, kF32 = 6, kBool = 7, kString = 8, kArray = 9,
                            kU64 = 10;

  template <typename T>
  static std::string raw(T value) {
    return {reinterpret_cast<const char*>(&value), sizeof(value)};
  }
  static std::string text(std::string_view value) {
    return raw<uint64_t>(value.size()) + std::string(value);
  }

  /// A metadata value of any type number and payload.
  void value(std::string_view key, uint32_t type, const std::string& payload) {
    values += text(key) + raw(type) + payload;
    ++value_count;
  }
  void u32(std::string_view key, uint32_t number) { value(key, kU32, raw(number)); }
  void f32(std::string_view key, float number) { value(key, kF32, raw(number)); }
  void string(std::string_view key, std::string_view content) {
    value(key, kString, text(content));
  }
  void strings(std::string_view key, const std::vector<std::string>& all) {
    std::string payload = raw(kString) + raw<uint64_t>(all.size());
    for (const auto& one : all) {
      payload += text(one);
    }
    value(key, kArray, payload);
  }
  template <typename T>
  void array(std::string_view key, uint32_t type, const std::vector<T>& all) {
    std::string payload = raw(type) + raw<uint64_t>(all.size());
    for (const T one : all) {
      payload += raw(one);
    }
    value(key, kArray, payload);
  }

  /// A tensor's entry; `sizes` as the file has them, row length first.
  void entry(std::string_view name,
             const std::vector<uint64_t>& sizes,
             uint32_t type,
             uint64_t offset) {
    entries += text(name) + raw<uint32_t>(static_cast<uint32_t>(sizes.size()));
    for (const uint64_t size : sizes) {
      entries += raw(size);
    }
    entries += raw(type) + raw(offset);
    ++tensor_count;
  }
  /// An entry, and its bytes at the end of the data.
  void tensor(std::string_view name,
              const std::vector<uint64_t>& sizes,
              uint32_t type,
              const std::string& content) {
    entry(name, sizes, type, data.size());
    data += content;
    data.append((kAlignment - data.size() % kAlignment) % kAlignment, '\0');
  }
  /// A float32 tensor of first, first + step, first + 2 step, ..
  void floats(std::string_view name,
              const std::vector<uint64_t>& sizes,
              float first = 0,
              float step = 1) {
    uint64_t count = 1;
    for (const uint64_t size : sizes) {
      count *= size;
    }
    std::string content;
    for (uint64_t i = 0; i < count; ++i) {
      content += raw(first + step * static_cast<float>(i));
    }
    tensor(name, sizes, /*F32=*/0, content);
  }

  std::string bytes() const {
    std::string file =
        magic + raw(version) + raw(tensor_count) + raw(value_count) + values + entries;
    if (!data.empty()) {
      file.append((kAlignment - file.size() % kAlignment) % kAlignment, '\0');
    }
    return file + data;
  }

  std::string magic = "GGUF";
  uint32_t version = 3;
  uint64_t tensor_count = 0;
  uint64_t value_count = 0;
  std::string values = {};
  std::string entries = {};
  std::string data = {};

 private:
  static constexpr size_t kAlignment = 32;
};

/// A whole Gemma 3 of one layer: V 4, E 32, F 64, H 2, G 1, D 16.
inline GgufWriter tiny_gemma_gguf() {
  GgufWriter file;
  file.string("general.architecture", "gemma3");
  file.u32("gemma3.context_length", 64);
  file.u32("gemma3.embedding_length", 32);
  file.u32("gemma3.block_count", 1);
  file.u32("gemma3.feed_forward_length", 64);
  file.u32("gemma3.attention.head_count", 2);
  file.u32("gemma3.attention.head_count_kv", 1);
  file.u32("gemma3.attention.key_length", 16);
  file.f32("gemma3.attention.layer_norm_rms_epsilon", 1e-6F);
  file.f32("gemma3.rope.freq_base", 1e6F);
  file.u32("gemma3.attention.sliding_window", 8);
  file.strings("tokenizer.ggml.tokens", {"<pad>", "<eos>", "<bos>", "<unk>"});
  file.array<float>("tokenizer.ggml.scores", GgufWriter::kF32, {0, -1, -2, -3});
  file.array<int32_t>("tokenizer.ggml.token_type", GgufWriter::kI32, {3, 3, 3, 2});
  file.floats("token_embd.weight", {32, 4});
  file.floats("output_norm.weight", {32}, /*first=*/1.5F, /*step=*/0);
  const std::string blk = "blk.0.";
  for (const char* norm : {"attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"}) {
    file.floats(blk + norm + ".weight", {32}, /*first=*/1, /*step=*/0);
  }
  for (const char* norm : {"attn_q_norm", "attn_k_norm"}) {
    file.floats(blk + norm + ".weight", {16}, /*first=*/1, /*step=*/0);
  }
  file.floats(blk + "attn_q.weight", {32, 32});
  file.floats(blk + "attn_k.weight", {32, 16});
  file.floats(blk + "attn_v.weight", {32, 16});
  file.floats(blk + "attn_output.weight", {32, 32});
  file.floats(blk + "ffn_gate.weight", {32, 64});
  file.floats(blk + "ffn_up.weight", {32, 64});
  file.floats(blk + "ffn_down.weight", {64, 32});
  return file;
}
