#include <unistd.h>

#include <filesystem>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/base/mapped_file.h"
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
