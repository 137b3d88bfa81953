#include "gemma_torch/io/file_bytes.h"

#include <ATen/Parallel.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <new>
#include <utility>

#include "gemma_torch/base/error.h"
#include "gemma_torch/base/mapped_file.h"
#include "gemma_torch/base/memory.h"

namespace gemma_torch {

FileBytes map_file(const std::string& path) {
  auto file = std::make_shared<MappedFile>(path);
  return {.owner = file, .data = file->data(), .size = file->size(), .name = path};
}

FileBytes read_to_large_pages(const std::string& path) {
  constexpr int64_t kPiece = int64_t{4} << 20;
  const MappedFile file(path);  // opens, checks and measures it; its pages are not touched
  auto owner = large_pages(file.size());
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  check(descriptor >= 0, "[open] {}: {}", path, std::strerror(errno));
  const auto size = static_cast<int64_t>(file.size());
  std::atomic<bool> whole{true};
  at::parallel_for(
      0, (size + kPiece - 1) / kPiece, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
        int64_t at = begin * kPiece;
        const int64_t stop = std::min(size, end * kPiece);
        while (at < stop) {
          const auto got =
              ::pread(descriptor, owner.get() + at, static_cast<size_t>(stop - at), at);
          if (got == 0 || (got < 0 && errno != EINTR)) {
            whole = false;
            return;
          }
          at += std::max<int64_t>(got, 0);
        }
      });
  ::close(descriptor);
  check(whole, "[read] {}: expected {} bytes, the file ended or failed before", path, size);
  auto* data = owner.get();
  return {.owner = std::move(owner), .data = data, .size = file.size(), .name = path};
}

FileBytes copy_bytes(std::string_view bytes, std::string name) {
  constexpr auto kAlignment = std::align_val_t{64};
  // Exactly the size of the content, so that a sanitizer sees the first byte read past it.
  std::shared_ptr<void> owner(::operator new(bytes.size(), kAlignment),
                              [](void* p) { ::operator delete(p, kAlignment); });
  if (!bytes.empty()) {
    std::memcpy(owner.get(), bytes.data(), bytes.size());
  }
  auto* data = static_cast<std::byte*>(owner.get());
  return {.owner = owner, .data = data, .size = bytes.size(), .name = std::move(name)};
}

std::string printable(std::string_view text) {
  constexpr size_t kLongest = 80;
  std::string line;
  for (const char c : text.substr(0, kLongest)) {
    if (c >= 0x20 && c < 0x7f) {
      line += c;
    } else {
      line += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    }
  }
  return text.size() > kLongest ? line + "..." : line;
}

}  // namespace gemma_torch
