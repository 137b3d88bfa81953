#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace gemma_torch {

/// A file mapped privately into memory: pages are read when touched, and writes stay in this process.
class MappedFile {
 public:
  /// Throws: Error if the file cannot be opened or mapped. An empty file maps to size() == 0.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  std::string path_;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace gemma_torch
