#include "gemma_torch/base/memory.h"

#include <ATen/ops/from_blob.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>

#include "gemma_torch/base/error.h"

namespace gemma_torch {

std::shared_ptr<std::byte> large_pages(size_t bytes) {
  constexpr size_t kPage = size_t{2} << 20;
  const size_t whole = (bytes + kPage - 1) / kPage * kPage;  // or the end would lie on small ones
  const size_t reserved = whole + kPage;  // room to begin at a multiple of the page size
  void* address =
      ::mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  check(address != MAP_FAILED, "[memory] {} bytes: {}", bytes, std::strerror(errno));
  const auto start = (reinterpret_cast<uintptr_t>(address) + kPage - 1) / kPage * kPage;
#ifdef MADV_HUGEPAGE  // Linux; elsewhere pages are what they are
  ::madvise(reinterpret_cast<void*>(start), whole, MADV_HUGEPAGE);
#endif
  return {reinterpret_cast<std::byte*>(start),
          [address, reserved](std::byte*) { ::munmap(address, reserved); }};
}

std::shared_ptr<std::byte> PageArrays::allocate() const {
  auto memory = large_pages(bytes_);
  for (const auto& view : views_) {
    view(memory.get());
  }
  return memory;
}

void drop_resident(const void* data, size_t bytes) {
#if defined(__linux__)
  // Linux, "pagemap": bit 63 of a page's entry says that it is in memory, bit 61 that it is of a file or shared. Such a
  // page has its content elsewhere; one that this process alone has, or wrote to, would come back with another.
  constexpr uint64_t kBacked = uint64_t{1} << 63 | uint64_t{1} << 61;
  constexpr uintptr_t kEntries = 512;
  const int pagemap = ::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pagemap < 0) {  // it costs nothing but memory
    return;
  }
  const auto size = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / size;
  auto page = (reinterpret_cast<uintptr_t>(data) + size - 1) / size;
  while (page < end) {
    uint64_t entries[kEntries];
    const auto count = std::min(end - page, kEntries);
    const auto wanted = count * sizeof(uint64_t);
    if (::pread(pagemap, entries, wanted, static_cast<off_t>(page * sizeof(uint64_t))) !=
        static_cast<ssize_t>(wanted)) {
      break;
    }
    const auto backed = [&](uintptr_t i) { return (entries[i] & kBacked) == kBacked; };
    for (uintptr_t begin = 0; begin < count; ++begin) {
      auto stop = begin;
      while (stop < count && backed(stop)) {
        ++stop;
      }
      if (stop > begin) {
        ::madvise(
            reinterpret_cast<void*>((page + begin) * size), (stop - begin) * size, MADV_DONTNEED);
        begin = stop;
      }
    }
    page += count;
  }
  ::close(pagemap);
#else
  (void)data;
  (void)bytes;
#endif
}

at::Tensor zeros_on_large_pages(c10::IntArrayRef sizes, c10::ScalarType dtype) {
  const auto bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * c10::elementSize(dtype);
  auto owner = large_pages(bytes);
  auto* data = owner.get();
  return at::from_blob(data, sizes, [owner = std::move(owner)](void*) {}, at::TensorOptions(dtype));
}

}  // namespace gemma_torch
