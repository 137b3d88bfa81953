#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/io/safetensors.h"

namespace gemma_torch {

/// What the header says of a tensor before there is one.
struct TensorSpec {
  std::string name = {};
  c10::ScalarType dtype = c10::ScalarType::Float;
  std::vector<int64_t> shape = {};
};

/// A safetensors file written tensor by tensor, none of them kept, for more than memory holds. The
/// header goes first, so every name, dtype and shape is declared; values follow in that order. The
/// file appears whole, by commit(), or not at all. save_safetensors is this for tensors at hand.
class SafetensorsWriter {
 public:
  /// Writes the header: data will begin at a multiple of 64 bytes.
  /// Throws: Error for a name that is taken, reserved or no UTF-8, a dtype without a safetensors
  ///         form, a wider dtype after a narrower one (it would be misaligned), a header that
  ///         readers refuse for its length, or a path that cannot be written.
  SafetensorsWriter(const std::string& path,
                    const std::vector<TensorSpec>& specs,
                    const Metadata& metadata = {},
                    Unfinished unfinished = Unfinished::kRemoved);

  /// The next values of `name`: all of it, or a part of its elements, in order, with the rest to
  /// follow. Strided tensors and tensors of other devices are copied.
  /// Throws: Error if another tensor comes next, for another dtype or more values than declared,
  ///         and for a failed write (full disk).
  void write(const std::string& name, const at::Tensor& values);

  /// Leaves the next `count` elements of `name` as an earlier run of the same header wrote them.
  /// Throws: Error if they are not there, if another tensor comes next, or for more than declared.
  void skip(const std::string& name, int64_t count);

  /// Flushes to disk, then gives the file its name.
  /// Throws: Error naming the tensor that is still to come, or for a failed write.
  void commit();

  uint64_t bytes() const { return bytes_; }  // of the file so far, header included

 private:
  // Bytes of `name` that are still to come. Throws: Error if another tensor comes next.
  uint64_t left_of(const std::string& name) const;
  void advance(uint64_t bytes);

  std::string path_;
  std::vector<TensorSpec> specs_;
  std::optional<AtomicFile> file_;  // opened once the header is known to be good
  size_t next_ = 0;                 // the spec whose values come next
  uint64_t written_ = 0;            // bytes of its values so far
  uint64_t bytes_ = 0;
};

}  // namespace gemma_torch
