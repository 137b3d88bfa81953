#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

namespace gemma_torch {

/// The bytes of one weight file and whatever keeps them alive: a private mapping, or a copy in
/// memory. Tensors over these bytes hold `owner`, so the file may go out of scope before they do.
struct FileBytes {
  std::shared_ptr<void> owner = {};
  std::byte* data = nullptr;  // writable; writes never reach the file
  size_t size = 0;
  std::string name = {};  // the path, for messages
};

/// Maps `path` privately. Throws: Error if it cannot be opened or mapped.
FileBytes map_file(const std::string& path);

/// Reads `path` into memory on large pages (base/memory.h), on at::get_num_threads() threads: for weights that are read
/// again with every token. Throws: Error if it cannot be read.
FileBytes read_to_large_pages(const std::string& path);

/// Copies `bytes` to 64-byte aligned memory: for tests, fuzzers and files that arrive otherwise.
FileBytes copy_bytes(std::string_view bytes, std::string name);

/// `text` fit for a one-line message: control and non-ASCII bytes as \xNN, cut after 80 characters.
std::string printable(std::string_view text);

}  // namespace gemma_torch
