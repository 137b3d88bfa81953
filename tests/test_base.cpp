#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <span>
#include <vector>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/base/mapped_file.h"
#include "gemma_torch/base/memory.h"
#include "gemma_torch/base/tensor_map.h"
#include "support/catch.h"

using namespace gemma_torch;

TEST_CASE("check throws one formatted line", "[base]") {
  CHECK_NOTHROW(check(true, "unused {}", 1));
  CHECK_THROWS_WITH(check(false, "[load] {}: expected {}", "a.weight", shape_str({2, 3})),
                    "[load] a.weight: expected (2, 3)");
}

TEST_CASE("an atomic file appears whole or not at all", "[base]") {
  const auto folder =
      std::filesystem::temp_directory_path() / fmt::format("gemma_base_{}", ::getpid());
  std::filesystem::create_directory(folder);
  const std::string path = folder / "x.txt";
  {
    AtomicFile file(path);
    file.write("half", 4);
  }
  CHECK(std::filesystem::is_empty(folder));
  write_file(path, "whole");
  CHECK(read_file(path) == "whole");
  CHECK_THROWS_AS(read_file(path, /*limit=*/4), Error);
  CHECK(MappedFile(path).size() == 5);
  CHECK_THROWS_AS(MappedFile(folder), Error);
  CHECK_THROWS_AS(write_file(folder / "no" / "x", "y"), Error);
  std::filesystem::remove_all(folder);
}

TEST_CASE("arrays of one piece of memory: zeros, from lines of their own, apart where asked",
          "[base]") {
  std::span<float> a, b;
  std::span<int8_t> c;
  PageArrays arrays;
  arrays.add(a, 3);
  arrays.add(b, 100);
  arrays.skip(4096);
  arrays.add(c, 200);
  const auto memory = arrays.allocate();
  const auto begin = [&](const auto& array) {
    return reinterpret_cast<const std::byte*>(array.data()) - memory.get();
  };
  CHECK((a.size() == 3 && b.size() == 100 && c.size() == 200));
  CHECK(begin(a) == 0);
  for (const auto at : {begin(b), begin(c)}) {
    CHECK(at % 64 == 0);
  }
  CHECK(begin(b) >= 64);
  CHECK(begin(c) >= begin(b) + 400 + 4096);
  CHECK(std::all_of(c.begin(), c.end(), [](auto x) { return x == 0; }));
}

#ifdef __linux__
namespace {

// Of files, in this process.
int64_t resident_bytes() {
  int64_t all = 0, resident = 0, of_files = 0;
  std::ifstream("/proc/self/statm") >> all >> resident >> of_files;
  return of_files * ::sysconf(_SC_PAGESIZE);
}

}  // namespace

TEST_CASE("dropped pages of a file leave the process, not the page cache; others stay", "[base]") {
  constexpr size_t kSize = size_t{32} << 20;
  const std::string path =
      std::filesystem::temp_directory_path() / fmt::format("gemma_drop_{}", ::getpid());
  write_file(path, std::string(kSize, 'a'));
  {
    const MappedFile file(path);
    const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
    for (size_t at = 0; at < kSize; at += page) {
      REQUIRE(file.data()[at] == std::byte{'a'});
    }
    file.data()[5 * page] = std::byte{'b'};  // this page is the process's own now
    const auto before = resident_bytes();
    drop_resident(file.data() + 1, kSize - 1);
    CHECK(before - resident_bytes() > static_cast<int64_t>(kSize / 2));
    CHECK(file.data()[5 * page] == std::byte{'b'});
    CHECK(file.data()[6 * page] == std::byte{'a'});

    std::vector<unsigned char> cached(kSize / page);
    REQUIRE(::mincore(file.data(), kSize, cached.data()) == 0);
    CHECK(std::all_of(cached.begin(), cached.end(), [](auto bits) { return (bits & 1) != 0; }));
  }
  std::filesystem::remove(path);

  const auto memory = large_pages(kSize);
  std::memset(memory.get(), 7, kSize);
  drop_resident(memory.get(), kSize);
  CHECK(std::all_of(memory.get(), memory.get() + kSize, [](auto b) { return b == std::byte{7}; }));
}
#endif
