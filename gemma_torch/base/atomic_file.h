#pragma once

#include <cstddef>
#include <string>

namespace gemma_torch {

/// What becomes of a file that was not committed: it goes, or it stays as part_path() for a later run to go on with.
enum class Unfinished { kRemoved, kKept };

/// "PATH.part".
std::string part_path(const std::string& path);

/// A file that appears under its name whole or not at all: written to a temporary name in the same folder, then
/// renamed by commit(). Destroyed before commit(), it removes the temporary file, unless that is to be kept; then
/// writing begins at the start of what is there, which one process at a time may do.
/// Throws: Error naming the path on any failure (unwritable folder, full disk).
class AtomicFile {
 public:
  explicit AtomicFile(std::string path, Unfinished unfinished = Unfinished::kRemoved);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t bytes);
  /// Leaves bytes as an earlier run wrote them. Throws: Error if they are not there.
  void skip(size_t bytes);
  void commit();  // flushes to disk, then renames

 private:
  std::string path_;
  std::string temporary_;
  Unfinished unfinished_;
  int descriptor_ = -1;
};

/// The whole file as a string. Throws: Error if it cannot be read or is larger than `limit` bytes.
std::string read_file(const std::string& path, size_t limit = size_t{1} << 30);

/// Writes `text` to `path` through AtomicFile.
void write_file(const std::string& path, const std::string& text);

}  // namespace gemma_torch
