#include <cstdint>

#include "support/damaged.h"
#include "support/gguf_writer.h"

namespace {

/// A safetensors file of this header, with any length it claims, and `data` bytes of zeros.
std::string safetensors(const std::string& header, size_t data, uint64_t claimed) {
  return GgufWriter::raw(claimed) + header + std::string(data, '\0');
}
std::string safetensors(const std::string& header, size_t data) {
  return safetensors(header, data, header.size());
}

/// One tensor "a" of this dtype, shape and offsets over 8 bytes of data.
std::string one_tensor(const std::string& dtype,
                       const std::string& shape,
                       const std::string& offsets) {
  return safetensors(
      R"({"a":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}",
      8);
}

std::string nested(int depth) {
  return std::string(static_cast<size_t>(depth), '[') +
         std::string(static_cast<size_t>(depth), ']');
}

/// tiny_gemma_gguf, changed and written.
template <typename Change>
std::string gguf(Change change) {
  auto file = tiny_gemma_gguf();
  change(file);
  return file.bytes();
}

/// A GGUF file with one float32 tensor "w" whose entry is `write`'s.
template <typename Write>
std::string one_entry(Write write) {
  GgufWriter file;
  write(file);
  file.data.assign(64, '\0');
  return file.bytes();
}

std::string without_key(const std::string& key) {
  return gguf([&](GgufWriter& file) {
    const size_t at = file.values.find(key);
    file.values[at] = 'X';  // the same length under another name
  });
}

}  // namespace

std::string good_safetensors() {
  return safetensors(
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
      R"("b":{"dtype":"I8","shape":[2,2],"data_offsets":[8,12]}})",
      12);
}

std::vector<Damaged> damaged_safetensors() {
  const std::string a = R"("a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]})";
  const auto good = good_safetensors();
  return {
      {"empty", "", "too short"},
      {"seven_bytes", std::string(7, '\0'), "too short"},
      {"length_past_end", safetensors("{}", 0, 3), "header length 3"},
      {"length_2_64", safetensors("{}", 0, ~uint64_t{0}), "header length 18446744073709551615"},
      {"length_2_63", safetensors("{}", 0, uint64_t{1} << 63), "header length 9223372036854775808"},
      {"length_wraps", safetensors("{}", 0, ~uint64_t{0} - 7), "header length"},
      {"length_zero", safetensors("", 8), "does not begin"},
      {"other_format", "GGUF" + std::string(64, '\3'), "header length"},
      {"no_json", safetensors("{nope", 0), "[json]"},
      {"cut_json", safetensors(R"({"a":{"dtype")", 0), "[json]"},
      {"two_documents", safetensors("{}{}", 0), "[json]"},
      {"array_header", safetensors("[]", 0), "does not begin"},
      {"invalid_utf8", safetensors("{\"\xff\":1}", 0), "[json]"},
      {"huge_number", safetensors(R"({"a":1e999})", 0), "[json]"},
      {"deep", safetensors(R"({"a":)" + nested(100'000) + "}", 0), "nesting"},
      {"name_twice", safetensors("{" + a + "," + a + "}", 4), "appears twice"},
      {"dtype_twice", one_tensor(R"("I8","dtype":"F32")", "[8]", "[0,8]"), "appears twice"},
      {"entry_is_number", safetensors(R"({"a":1})", 0), "expected an object"},
      {"entry_lacks_dtype",
       safetensors(R"({"a":{"shape":[],"data_offsets":[0,0],"x":1}})", 0),
       "expected an object"},
      {"entry_has_more", one_tensor(R"("I8","x":1)", "[8]", "[0,8]"), "expected an object"},
      {"metadata_not_text", safetensors(R"({"__metadata__":{"a":1}})", 0), "__metadata__"},
      {"metadata_array", safetensors(R"({"__metadata__":[]})", 0), "__metadata__"},
      {"dtype_unknown", one_tensor(R"("F8_E8M0")", "[8]", "[0,8]"), "unsupported dtype"},
      {"dtype_number", one_tensor("3", "[8]", "[0,8]"), "unsupported dtype"},
      {"dtype_wrong", one_tensor(R"("F32")", "[8]", "[0,8]"), "expected 32 bytes"},
      {"shape_object", one_tensor(R"("I8")", "{}", "[0,8]"), "\"shape\""},
      {"shape_negative", one_tensor(R"("I8")", "[-8]", "[0,8]"), "got -8"},
      {"shape_fraction", one_tensor(R"("I8")", "[8.0]", "[0,8]"), "got 8.0"},
      {"shape_text", one_tensor(R"("I8")", R"(["8"])", "[0,8]"), "in shape"},
      {"shape_2_63", one_tensor(R"("I8")", "[9223372036854775808]", "[0,8]"), "2^63 - 1"},
      {"shape_wraps", one_tensor(R"("F64")", "[4294967296,4294967296]", "[0,0]"), "2^63 bytes"},
      {"shape_wraps_to_8", one_tensor(R"("F64")", "[2305843009213693953]", "[0,8]"), "2^63 bytes"},
      {"shape_empty_wraps",
       one_tensor(R"("F64")", "[0,4294967296,4294967296]", "[0,0]"),
       "2^63 bytes"},
      {"shape_rank",
       one_tensor(
           R"("I8")",
           "[8" +
               [] {
                 std::string ones;
                 for (int i = 0; i < 64; ++i) {
                   ones += ",1";
                 }
                 return ones;
               }() +
               "]",
           "[0,8]"),
       "dimensions"},
      {"offsets_one", one_tensor(R"("I8")", "[8]", "[8]"), "two data_offsets"},
      {"offsets_reversed", one_tensor(R"("I8")", "[8]", "[8,0]"), "data_offsets are [8, 0]"},
      {"offsets_negative", one_tensor(R"("I8")", "[8]", "[-8,0]"), "got -8"},
      {"offsets_2_64",
       one_tensor(R"("I8")", "[8]", "[18446744073709551608,18446744073709551616]"),
       "data_offsets"},
      {"data_short", safetensors("{" + a + "}", 3), "cut short"},
      {"data_long", safetensors("{" + a + "}", 5), "5 bytes of data, tensors cover 4"},
      {"data_unnamed", safetensors("{}", 5), "tensors cover 0"},
      {"overlap",
       safetensors("{" + a + R"(,"b":{"dtype":"I8","shape":[4],"data_offsets":[3,7]}})", 7),
       "got 3"},
      {"same_bytes",
       safetensors("{" + a + R"(,"b":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}})", 4),
       "got 0"},
      {"gap",
       safetensors("{" + a + R"(,"b":{"dtype":"I8","shape":[4],"data_offsets":[5,9]}})", 9),
       "got 5"},
      {"bool_two",
       safetensors(R"({"a":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]}})", 0) + "\2",
       "BOOL"},
      {"cut_in_half", good.substr(0, good.size() / 2), "header length"},
      {"cut_by_one", good.substr(0, good.size() - 1), "cut short"},
  };
}

std::vector<Damaged> damaged_gguf() {
  using W = GgufWriter;
  constexpr uint64_t kHuge = uint64_t{1} << 63;
  const auto good = tiny_gemma_gguf().bytes();
  const auto value = [](uint32_t type, const std::string& payload) {
    return gguf([&](W& file) {
      file.value("x", type, payload);
      file.data.clear();
      file.entries.clear();
      file.tensor_count = 0;
    });
  };
  const auto entry = [](const std::vector<uint64_t>& sizes, uint32_t type, uint64_t offset) {
    return one_entry([&](W& file) { file.entry("w", sizes, type, offset); });
  };
  return {
      {"empty", "", "the magic number"},
      {"magic", gguf([](W& file) { file.magic = "GGML"; }), "begins with GGUF"},
      {"version_1", gguf([](W& file) { file.version = 1; }), "got 1"},
      {"version_99", gguf([](W& file) { file.version = 99; }), "got 99"},
      {"big_endian", gguf([](W& file) { file.version = 0x03000000; }), "big-endian"},
      {"header_only", good.substr(0, 24), "tensor count is 15"},
      {"cut_in_metadata", good.substr(0, 300), "cut short"},
      {"cut_in_entries", good.substr(0, 1300), "tensor"},
      {"cut_in_data", good.substr(0, good.size() - 1), "cut short"},
      {"values_2_63",
       gguf([&](W& file) { file.value_count = kHuge; }),
       "metadata count is 9223372036854775808"},
      {"values_2_64", gguf([](W& file) { file.value_count = ~uint64_t{0}; }), "metadata count"},
      {"tensors_2_63",
       gguf([&](W& file) { file.tensor_count = kHuge; }),
       "tensor count is 9223372036854775808"},
      {"values_one_more", gguf([](W& file) { file.value_count += 1; }), "takes"},
      {"tensors_many_more",
       gguf([](W& file) {
         file.tensor_count += 100;
         file.data.clear();
       }),
       "tensor count is 115"},
      {"key_length_2_63",
       gguf([&](W& file) {
         file.values = W::raw(kHuge);
         file.value_count = 1;
       }),
       "a metadata key"},
      {"key_length_2_64",
       gguf([](W& file) {
         file.values = W::raw(~uint64_t{0}) + "abc";
         file.value_count = 1;
       }),
       "a metadata key"},
      {"key_twice", gguf([](W& file) { file.u32("gemma3.block_count", 2); }), "appears twice"},
      {"value_type_13", value(13, std::string(8, '\0')), "value type 13"},
      {"value_type_2_32", value(0xffffffff, std::string(8, '\0')), "value type 4294967295"},
      {"value_cut", value(W::kU64, "abc"), "a value"},
      {"string_2_63", value(W::kString, W::raw(kHuge)), "a string"},
      {"array_of_arrays",
       value(W::kArray, W::raw(W::kArray) + W::raw(uint64_t{1})),
       "value type 9"},
      {"array_of_type_99", value(W::kArray, W::raw(99) + W::raw(uint64_t{1})), "value type 99"},
      {"array_2_63",
       value(W::kArray, W::raw(W::kU64) + W::raw(kHuge)),
       "an array length is 9223372036854775808"},
      {"array_wraps",
       value(W::kArray, W::raw(W::kU64) + W::raw((uint64_t{1} << 61) + 1)),
       "an array length"},
      {"strings_2_63", value(W::kArray, W::raw(W::kString) + W::raw(kHuge)), "an array length"},
      {"strings_cut",
       value(W::kArray, W::raw(W::kString) + W::raw(uint64_t{1}) + W::raw(uint64_t{9})),
       "a string"},
      {"alignment_zero", gguf([](W& file) { file.u32("general.alignment", 0); }), "got 0"},
      {"alignment_2_31",
       gguf([](W& file) { file.u32("general.alignment", 0x80000000); }),
       "got 2147483648"},
      {"alignment_24", gguf([](W& file) { file.u32("general.alignment", 24); }), "got 24"},
      {"alignment_text",
       gguf([](W& file) { file.string("general.alignment", "32"); }),
       "got string"},
      {"alignment_negative",
       gguf([](W& file) { file.value("general.alignment", W::kI32, W::raw(-32)); }),
       "got -32"},
      {"rank_zero", entry({}, 0, 0), "got 0"},
      {"rank_5", entry({1, 1, 1, 1, 1}, 0, 0), "got 5"},
      {"rank_2_32",
       one_entry([](W& file) {
         file.entries = W::text("w") + W::raw(0xffffffff) + std::string(64, '\1');
         file.tensor_count = 1;
       }),
       "got 4294967295"},
      {"shape_zero", entry({0}, 0, 0), "is empty"},
      {"shape_wraps", entry({uint64_t{1} << 32, uint64_t{1} << 32}, 0, 0), "2^63"},
      {"shape_wraps_to_4", entry({(uint64_t{1} << 62) + 1, 4}, 0, 0), "2^63"},
      {"shape_2_63", entry({kHuge}, 0, 0), "2^63"},
      {"bytes_wrap", entry({(uint64_t{1} << 62) + 16}, 0, 0), "2^64 bytes"},
      {"row_not_blocks", entry({31}, 8, 0), "multiple of 32"},
      {"row_not_super_blocks", entry({32}, 12, 0), "multiple of 256"},
      {"type_unknown", entry({16}, 99, 0), "tensor type 99"},
      {"type_removed", entry({16}, 4, 0), "tensor type 4"},
      {"type_iq4", entry({32}, 20, 0), "tensor type 20"},
      {"offset_odd", entry({1}, 0, 4), "multiple of 32"},
      {"offset_past_end", entry({1}, 0, 1 << 20), "do not lie in"},
      {"offset_2_63", entry({1}, 0, kHuge), "do not lie in"},
      {"offset_wraps", entry({16}, 0, ~uint64_t{0} - 31), "do not lie in"},
      {"tensor_past_end", entry({17}, 0, 0), "68 bytes at offset 0"},
      {"tensor_twice",
       one_entry([](W& file) {
         file.entry("w", {8}, 0, 0);
         file.entry("w", {8}, 0, 32);
       }),
       "appears twice"},
      {"tensors_overlap",
       one_entry([](W& file) {
         file.entry("v", {9}, 0, 0);
         file.entry("w", {8}, 0, 32);
       }),
       "before v ends at 36"},
      {"tensors_same",
       one_entry([](W& file) {
         file.entry("v", {8}, 0, 0);
         file.entry("w", {8}, 0, 0);
       }),
       "ends at 32"},
      {"name_2_63",
       one_entry([&](W& file) {
         file.entries = W::raw(kHuge) + std::string(40, '\1');
         file.tensor_count = 1;
       }),
       "a tensor name"},
  };
}

std::vector<Damaged> damaged_gguf_models() {
  using W = GgufWriter;
  const auto tokens = [](const std::string& key, const std::string& payload) {
    auto file = tiny_gemma_gguf();
    file.values[file.values.find(key)] = 'X';
    file.value(key, W::kArray, payload);
    return file.bytes();
  };
  const auto array = [](uint32_t type, uint64_t count, const std::string& elements) {
    return W::raw(type) + W::raw(count) + elements;
  };
  const std::string types = "tokenizer.ggml.token_type";
  const std::string scores = "tokenizer.ggml.scores";
  return {
      {"no_architecture",
       without_key("general.architecture"),
       "general.architecture: key is missing"},
      {"no_width",
       without_key("gemma3.embedding_length"),
       "gemma3.embedding_length: key is missing"},
      {"no_tokens", without_key("tokenizer.ggml.tokens"), "tokenizer.ggml.tokens: key is missing"},
      {"layers_2_32",
       gguf([](W& file) {
         file.values[file.values.find("gemma3.block_count")] = 'X';
         file.u32("gemma3.block_count", 0xffffffff);
       }),
       "got 4294967295"},
      {"heads_text",
       gguf([](W& file) {
         file.values[file.values.find("gemma3.attention.head_count")] = 'X';
         file.string("gemma3.attention.head_count", "2");
       }),
       "got string"},
      {"pattern_zero",
       gguf([](W& file) { file.u32("gemma3.attention.sliding_window_pattern", 0); }),
       "at least 1"},
      {"pattern_long",
       gguf([](W& file) {
         file.array<uint8_t>("gemma3.attention.sliding_window_pattern", W::kBool, {1, 1});
       }),
       "layer_types"},
      {"scaling_yarn",
       gguf([](W& file) { file.string("gemma3.rope.scaling.type", "yarn"); }),
       "got yarn"},
      {"scaling_no_factor",
       gguf([](W& file) { file.string("gemma3.rope.scaling.type", "linear"); }),
       "factor: key is missing"},
      {"soft_capping",
       gguf([](W& file) { file.f32("gemma3.final_logit_softcapping", 30); }),
       "softcapping"},
      // Four bytes where four int32 are read: once a read past the end elsewhere.
      {"types_narrow", tokens(types, array(/*uint8=*/0, 4, "\3\3\3\377")), "got 255"},
      {"types_short", tokens(types, array(W::kI32, 1, W::raw(3))), "1 types"},
      {"types_float",
       tokens(types, array(W::kF32, 4, std::string(16, '\0'))),
       "got an array of float32"},
      {"types_text",
       tokens(types, array(W::kString, 4, std::string(32, '\0'))),
       "got an array of string"},
      {"type_zero", tokens(types, array(W::kI32, 4, std::string(16, '\0'))), "got 0 for token 0"},
      {"type_negative",
       tokens(types, array(W::kI32, 4, std::string(16, '\377'))),
       "got -1 for token 0"},
      {"scores_none", tokens(scores, array(W::kF32, 0, "")), "0 scores"},
      {"scores_text",
       tokens(scores, array(W::kString, 4, std::string(32, '\0'))),
       "got an array of string"},
      {"tokens_numbers",
       tokens("tokenizer.ggml.tokens", array(W::kI32, 4, std::string(16, '\0'))),
       "expected an array of strings"},
      {"stranger",
       gguf([](W& file) { floats(file, "rope_freqs.weight", {8}); }),
       "rope_freqs.weight: Gemma 3 has no"},
      {"bad_layer_number",
       gguf([](W& file) { floats(file, "blk.-1.ffn_up.weight", {8}); }),
       "Gemma 3 has no"},
  };
}
