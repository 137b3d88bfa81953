#pragma once

#include "gemma_torch/io/gguf_writer.h"

using gemma_torch::GgufWriter;

/// Adds a float32 tensor of first, first + step, first + 2 step, ..
inline void floats(GgufWriter& file,
                   std::string_view name,
                   const std::vector<uint64_t>& sizes,
                   float first = 0,
                   float step = 1) {
  uint64_t count = 1;
  for (const uint64_t size : sizes) {
    count *= size;
  }
  std::string content;
  for (uint64_t i = 0; i < count; ++i) {
    content += GgufWriter::raw(first + step * static_cast<float>(i));
  }
  file.tensor(name, sizes, /*F32=*/0, content);
}

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
  floats(file, "token_embd.weight", {32, 4});
  floats(file, "output_norm.weight", {32}, /*first=*/1.5F, /*step=*/0);
  const std::string blk = "blk.0.";
  for (const char* norm : {"attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"}) {
    floats(file, blk + norm + ".weight", {32}, /*first=*/1, /*step=*/0);
  }
  for (const char* norm : {"attn_q_norm", "attn_k_norm"}) {
    floats(file, blk + norm + ".weight", {16}, /*first=*/1, /*step=*/0);
  }
  floats(file, blk + "attn_q.weight", {32, 32});
  floats(file, blk + "attn_k.weight", {32, 16});
  floats(file, blk + "attn_v.weight", {32, 16});
  floats(file, blk + "attn_output.weight", {32, 32});
  floats(file, blk + "ffn_gate.weight", {32, 64});
  floats(file, blk + "ffn_up.weight", {32, 64});
  floats(file, blk + "ffn_down.weight", {64, 32});
  return file;
}
