#include "gemma_torch/io/file_bytes.h"

#include <fmt/format.h>

#include <cstring>
#include <new>
#include <utility>

#include "gemma_torch/base/mapped_file.h"

namespace gemma_torch {

FileBytes map_file(const std::string& path) {
  auto file = std::make_shared<MappedFile>(path);
  return {.owner = file, .data = file->data(), .size = file->size(), .name = path};
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
