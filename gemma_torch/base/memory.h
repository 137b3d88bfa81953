#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace gemma_torch {

/// `bytes` of zeroed memory, aligned to 2 MiB and on pages of that size where the system grants them: reading weights
/// from it is faster by up to a half than from pages of 4 KiB. Given back when the last owner goes.
/// Throws: Error if there is not that much.
std::shared_ptr<std::byte> large_pages(size_t bytes);

/// A tensor on the CPU over such memory, all zeros.
at::Tensor zeros_on_large_pages(c10::IntArrayRef sizes, c10::ScalarType dtype);

/// Arrays that lie in one piece of such memory, each from a line of its own, in the order of add().
class PageArrays {
 public:
  /// `count` zeros that `array` is to view; it must stay where it is until allocate().
  template <typename T>
  void add(std::span<T>& array, int64_t count) {
    const auto n = static_cast<size_t>(count);
    views_.push_back([&array, n, at = bytes_](std::byte* start) {
      array = {reinterpret_cast<T*>(start + at), n};
    });
    skip(n * sizeof(T));
  }

  /// Leaves at least `bytes` free.
  void skip(size_t bytes) { bytes_ += (bytes + kLines - 1) / kLines * kLines; }

  /// The memory that the arrays view from now on. Throws as large_pages does.
  std::shared_ptr<std::byte> allocate() const;

 private:
  static constexpr size_t kLines = 128;  // bytes: two lines, which CPUs fetch together

  std::vector<std::function<void(std::byte*)>> views_;
  size_t bytes_ = 0;
};

/// Takes the pages of [data, data + bytes) that are of a mapped file out of this process; they stay in the system's page
/// cache and come back where they are read. Pages that were written to, and other memory, are left alone.
void drop_resident(const void* data, size_t bytes);

}  // namespace gemma_torch
