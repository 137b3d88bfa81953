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

std::string part_path(const std::string& path) {
  return path + ".part";
}

AtomicFile::AtomicFile(std::string path, Unfinished unfinished)
    : path_(std::move(path)), unfinished_(unfinished) {
  if (unfinished_ == Unfinished::kKept) {
    temporary_ = part_path(path_);
    descriptor_ = ::open(temporary_.c_str(), O_RDWR | O_CREAT, 0666);
    check(descriptor_ >= 0, "[write] {}: {}", temporary_, std::strerror(errno));
    return;
  }
  temporary_ = path_ + ".XXXXXX";
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
    if (unfinished_ == Unfinished::kRemoved) {
      ::unlink(temporary_.c_str());
    }
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

void AtomicFile::skip(size_t bytes) {
  struct stat info = {};
  check(::fstat(descriptor_, &info) == 0, "[write] {}: {}", path_, std::strerror(errno));
  const auto end = ::lseek(descriptor_, static_cast<off_t>(bytes), SEEK_CUR);
  check(end >= 0 && end <= info.st_size,
        "[write] {}: expected the first {} bytes of an earlier run, got {}. Hint: remove it to "
        "start anew",
        temporary_,
        end,
        info.st_size);
}

void AtomicFile::commit() {
  // What was there may have been longer.
  const auto size = ::lseek(descriptor_, 0, SEEK_CUR);
  check(::ftruncate(descriptor_, size) == 0, "[write] {}: {}", path_, std::strerror(errno));
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
