#include "gemma_torch/base/memory.h"

#include <ATen/ops/from_blob.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>

#include "gemma_torch/base/error.h"

namespace gemma_torch {

std::shared_ptr<std::byte> large_pages(size_t bytes) {
  constexpr size_t kPage = size_t{2} << 20;
  const size_t reserved = bytes + kPage;  // room to begin at a multiple of the page size
  void* address =
      ::mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  check(address != MAP_FAILED, "[memory] {} bytes: {}", bytes, std::strerror(errno));
  const auto start = (reinterpret_cast<uintptr_t>(address) + kPage - 1) / kPage * kPage;
#ifdef MADV_HUGEPAGE  // Linux; elsewhere pages are what they are
  ::madvise(reinterpret_cast<void*>(start), bytes, MADV_HUGEPAGE);
#endif
  return {reinterpret_cast<std::byte*>(start),
          [address, reserved](std::byte*) { ::munmap(address, reserved); }};
}

namespace {

// Whether an address lies in a mapping of a file. Asking for pages of other memory would split large ones.
bool is_of_file(uintptr_t address) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    unsigned long begin = 0, end = 0, inode = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx %*s %*s %*s %lu", &begin, &end, &inode) == 3 &&
        address >= begin && address < end) {
      return inode != 0;
    }
  }
  return false;
}

}  // namespace

void drop_resident(const void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_PAGEOUT)
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto start = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (start < end &&
      is_of_file(start)) {  // advice: an older system's refusal costs nothing but memory
    ::madvise(reinterpret_cast<void*>(start), end - start, MADV_PAGEOUT);
  }
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
