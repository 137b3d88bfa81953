#include "gemma_torch/base/atomic_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>

#include "gemma_torch/base/error.h"

namespace gemma_torch {

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)), temporary_(path_ + ".XXXXXX") {
  descriptor_ = ::mkstemp(temporary_.data());
  check(descriptor_ >= 0, "[write] {}: {}", path_, std::strerror(errno));
  const mode_t mask =
      ::umask(0);  // mkstemp makes a file for its owner alone; give it the usual rights
  ::umask(mask);
  ::fchmod(descriptor_, 0666 & ~mask);
}

AtomicFile::~AtomicFile() {
  if (descriptor_ >= 0) {
    ::close(descriptor_);
    ::unlink(temporary_.c_str());
  }
}

void AtomicFile::write(const void* data, size_t bytes) {
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(descriptor_, at, bytes);
    if (written < 0 && errno == EINTR) {
      continue;
    }
    check(written > 0, "[write] {}: {}", path_, std::strerror(errno));
    at += written;
    bytes -= static_cast<size_t>(written);
  }
}

void AtomicFile::commit() {
  check(::fsync(descriptor_) == 0, "[write] {}: {}", path_, std::strerror(errno));
  check(::rename(temporary_.c_str(), path_.c_str()) == 0,
        "[write] {}: {}",
        path_,
        std::strerror(errno));
  ::close(descriptor_);
  descriptor_ = -1;
}

std::string read_file(const std::string& path, size_t limit) {
  struct stat info = {};
  check(::stat(path.c_str(), &info) == 0, "[read] {}: {}", path, std::strerror(errno));
  check(S_ISREG(info.st_mode), "[read] {}: not a regular file", path);
  const auto size = static_cast<size_t>(info.st_size);
  check(size <= limit, "[read] {}: {} bytes, more than the {} expected of it", path, size, limit);
  std::string text(size, '\0');
  std::ifstream file(path, std::ios::binary);
  file.read(text.data(), static_cast<std::streamsize>(size));
  check(static_cast<bool>(file), "[read] {}: {}", path, std::strerror(errno));
  return text;
}

void write_file(const std::string& path, const std::string& text) {
  AtomicFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

}  // namespace gemma_torch
