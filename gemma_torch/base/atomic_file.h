#pragma once

#include <cstddef>
#include <string>

namespace gemma_torch {

/// A file that appears under its name whole or not at all: written to a temporary name in the same folder, then
/// renamed by commit(). Destroyed before commit(), it removes the temporary file.
/// Throws: Error naming the path on any failure (unwritable folder, full disk).
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t bytes);
  void commit();  // flushes to disk, then renames

 private:
  std::string path_;
  std::string temporary_;
  int descriptor_ = -1;
};

/// The whole file as a string. Throws: Error if it cannot be read or is larger than `limit` bytes.
std::string read_file(const std::string& path, size_t limit = size_t{1} << 30);

/// Writes `text` to `path` through AtomicFile.
void write_file(const std::string& path, const std::string& text);

}  // namespace gemma_torch
