#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/io/file_bytes.h"
#include "gemma_torch/io/gguf_dequantize.h"

namespace gemma_torch {

/// One tensor of a GGUF file. The shape is torch's (rows first), the reverse of the order in the
/// file.
struct GgufTensor {
  GgmlType type = GgmlType::kF32;
  std::vector<int64_t> shape = {};
  const std::byte* data = nullptr;
  int64_t blocks = 0;  // of the type's layout
};

/// A GGUF file, version 3, little-endian: typed metadata and tensors over one mapping.
/// Opening checks the whole structure: counts, lengths, types, shapes, alignment, and that every
/// tensor's bytes lie inside the file and overlap no other's. Tensor data is read when it is
/// dequantised. Throws:  Error naming file, key or tensor, and the value. Source:  the format's
/// description (ggml-org/ggml, docs/gguf.md).
class GgufFile {
 public:
  explicit GgufFile(const std::string& path);
  explicit GgufFile(FileBytes bytes);

  const std::string& name() const { return file_.name; }
  const std::map<std::string, GgufTensor>& tensors() const { return tensors_; }

  bool has(const std::string& key) const { return values_.contains(key); }

  /// Metadata by key. Throws: Error where the key is absent or its value of another type.
  /// A whole number of any width is an integer; a number is an integer or a float, a float32 being
  /// taken as the shortest decimal that gives it (1e-06, as config.json has it,
  /// not 9.99999997e-07).
  std::string get_string(const std::string& key) const;
  int64_t get_integer(const std::string& key) const;
  double get_number(const std::string& key) const;
  bool get_bool(const std::string& key) const;
  bool is_array(const std::string& key) const;
  std::vector<std::string> get_strings(const std::string& key) const;
  std::vector<double> get_numbers(const std::string& key) const;
  std::vector<int64_t> get_integers(const std::string& key) const;  // bools count as 0 and 1

  /// Tensor `name` in float32, or rounded from that to bfloat16; on at::get_num_threads() threads.
  /// Throws: Error for an unknown name or another dtype.
  at::Tensor dequantize(const std::string& name, at::ScalarType dtype = at::kFloat) const;

 private:
  struct Value {
    uint32_t type = 0;  // of the elements, for an array
    bool array = false;
    uint64_t count = 1;
    const std::byte* data = nullptr;  // `count` packed elements, checked to lie inside the file
  };
  struct Cursor;

  const Value& value(const std::string& key, bool array, const char* expected) const;
  [[noreturn]] void wrong_type(const std::string& key, const char* expected) const;
  int64_t integer_at(const Value& value, uint64_t i, const std::string& key) const;
  double number_at(const Value& value, uint64_t i, const std::string& key) const;
  void parse();
  void parse_metadata(Cursor& at, uint64_t count);
  void parse_tensors(Cursor& at, uint64_t count);
  uint64_t alignment() const;

  FileBytes file_;
  std::map<std::string, Value> values_;
  std::map<std::string, GgufTensor> tensors_;
};

}  // namespace gemma_torch
