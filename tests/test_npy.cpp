#include "gemma_torch/io/npy.h"

#include <ATen/Functions.h>

#include "support/catch.h"
#include "support/error_of.h"
#include "support/npz_writer.h"

using namespace gemma_torch;
using Catch::Matchers::ContainsSubstring;

namespace {

at::Tensor read_array(const std::string& bytes) {
  return read_npy(copy_bytes(bytes, "x.npy"));
}
TensorMap read_archive(const std::string& bytes) {
  return read_npz(copy_bytes(bytes, "x.npz"));
}

std::string good_array() {
  return npz::npy(npz::header("<f4", "(2, 3)"), npz::floats({1, 2, 3, 4, 5, 6}));
}

std::string good_archive() {
  return npz::zip(
      {{"w.npy", good_array()}, {"b.npy", npz::npy(npz::header("<f4", "(1,)"), npz::floats({7}))}});
}

/// Every change of one byte is read or refused by an Error, as the sanitizers watch.
template <typename Read>
void change_bytes(const std::string& good, Read read) {
  int64_t refused = 0;
  for (size_t at = 0; at < good.size(); ++at) {
    for (const int flip : {0x01, 0x80, 0xff}) {
      auto bytes = good;
      bytes[at] = static_cast<char>(bytes[at] ^ flip);
      refused += error_of([&] { read(bytes); }).empty() ? 0 : 1;
    }
  }
  CHECK(refused > 0);
}

template <typename Read>
void cut_bytes(const std::string& good, Read read) {
  for (size_t length = 0; length < good.size(); ++length) {
    INFO(length);
    CHECK_FALSE(error_of([&] { read(good.substr(0, length)); }).empty());
  }
  CHECK(error_of([&] { read(good); }).empty());
}

}  // namespace

TEST_CASE("arrays are read in their own dtype and shape", "[npy]") {
  const auto array = read_array(good_array());
  CHECK(array.equal(at::arange(1, 7, at::kFloat).view({2, 3})));
  for (const char version : {1, 2, 3}) {
    const auto one = npz::npy(npz::header("<f4", "(1,)"), npz::floats({2.5F}), version);
    CHECK(read_array(one).equal(at::full({1}, 2.5F)));
  }
  const auto wide = npz::npy(npz::header("<f8", "(1, 1)"), npz::raw(0.1));
  CHECK(read_array(wide).equal(at::full({1, 1}, 0.1, at::kDouble)));
  const auto half = npz::npy(npz::header("<f2", "(2,)"), std::string("\x00\x3c\x00\xc0", 4));
  CHECK(read_array(half).equal(at::tensor({1.0, -2.0}).to(at::kHalf)));
  CHECK(read_array(npz::npy(npz::header("<f4", "()"), npz::floats({3}))).dim() == 0);
  CHECK(read_array(npz::npy(npz::header("<f4", "(0, 4)"), "")).sizes() == at::IntArrayRef({0, 4}));
}

TEST_CASE("an archive is its members by name", "[npy]") {
  const auto arrays = read_archive(good_archive());
  REQUIRE(arrays.size() == 2);
  CHECK(arrays.at("w").equal(at::arange(1, 7, at::kFloat).view({2, 3})));
  CHECK(arrays.at("b").item<float>() == 7);
  CHECK(read_archive(npz::zip({}, "a comment")).empty());
  CHECK(is_zip(copy_bytes(good_archive(), "x")));
  CHECK_FALSE(is_zip(copy_bytes(good_array(), "x")));
  CHECK_FALSE(is_zip(copy_bytes("PK", "x")));
}

TEST_CASE("damaged or foreign arrays are refused in one line", "[npy][damaged]") {
  const auto data = npz::floats({1, 2});
  const auto with = [&](const std::string& text) { return npz::npy(text, data); };
  const auto shape = [&](const std::string& sizes) { return with(npz::header("<f4", sizes)); };
  const std::vector<std::pair<std::string, std::string>> files = {
      {"", "which begins with"},
      {"NUMPY", "which begins with"},
      {std::string("\x93NUMPY\4\0aaaa", 12), "got 4"},
      {std::string("\x93NUMPY\1\0", 8), "cut short"},
      {std::string("\x93NUMPY\1\0\xff\xff{}", 12), "header of 65535 bytes"},
      {std::string("\x93NUMPY\2\0\xff\xff\xff\xff", 12), "header of 4294967295 bytes"},
      {with(npz::header(">f4", "(2,)")), "got >f4"},
      {with(npz::header("<i4", "(2,)")), "got <i4"},
      {with(npz::header("|O", "(2,)")), "got |O"},
      {with("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }"), "records"},
      {with("{'descr': '<f4', 'fortran_order': True, 'shape': (2,), }"), "Fortran order"},
      {with("{'descr': '<f4', 'shape': (2,), }"), "expected descr, fortran_order and shape"},
      {with("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'x': 1}"), "got more"},
      {with("{'descr': '<f4', 'order': False, 'shape': (2,)}"), "unknown key order"},
      {with("{'descr': '<f4"), "not closed"},
      {with("{}"), "expected descr"},
      {with(npz::header("<f4", "(2,)") + "x"), "expected its end"},
      {shape("(2"), "0 or more, got }"},
      {shape("(-2,)"), "0 or more"},
      {shape("(x,)"), "0 or more"},
      {shape("(1 2)"), "a comma"},
      {shape("(99999999999999999999,)"), "0 or more"},
      {shape("(4294967296, 4294967296)"), "too large"},
      {shape("(4611686018427387905, 4)"), "too large"},
      {shape("(3,)"), "expected 12 bytes"},
      {shape("(1,)"), "expected 4 bytes"},
      {shape("(0,)"), "expected 0 bytes"},
  };
  for (const auto& [bytes, why] : files) {
    INFO(why);
    const auto message = error_of([&] { read_array(bytes); });
    CHECK_THAT(message, ContainsSubstring(why));
    CHECK(message.starts_with("[npy] x.npy: "));
    CHECK(message.find('\n') == std::string::npos);
    CHECK(message.size() < 300);
  }
  std::string many = "(";
  for (int i = 0; i < 33; ++i) {
    many += "1, ";
  }
  CHECK_THAT(error_of([&] { read_array(shape(many + ")")); }), ContainsSubstring("at most 32"));
  cut_bytes(good_array(), read_array);
  change_bytes(good_array(), read_array);
}

TEST_CASE("damaged or compressed archives are refused in one line", "[npy][damaged]") {
  const auto good = good_archive();
  const auto changed = [&](size_t from_end, const std::string& bytes) {
    auto file = good;
    file.replace(file.size() - from_end, bytes.size(), bytes);
    return file;
  };
  const auto array = good_array();
  const std::vector<std::pair<std::string, std::string>> files = {
      {"", "no end of a zip archive"},
      {good.substr(0, good.size() - 1), "no end of a zip archive"},
      {npz::zip({{"w.npy", array, /*method=*/8}}), "np.savez instead of np.savez_compressed"},
      {npz::zip({{"w.npy", array, 0, /*flags=*/1}}), "encryption"},
      {npz::zip({{"w.txt", array}}), "got w.txt"},
      {npz::zip({{".npy", array}}), "got .npy"},
      {npz::zip({{"w.npy", array}, {"w.npy", array}}), "appears twice"},
      {npz::zip({{"w.npy", "abc"}}), "w.npy: expected a .npy file"},
      {changed(12, npz::raw(uint16_t{3})), "expected entry 3 of 3"},
      {changed(12, npz::raw(uint16_t{1})), "its directory ends at"},
      {changed(12, npz::raw(uint16_t{0xffff})), "less than 4 GiB"},
      {changed(6, npz::raw(uint32_t{5})), "expected entry 1 of 2 at byte 5"},
      {changed(6, npz::raw(uint32_t{0xfffffff0})), "expected entry 1 of 2 at byte 4294967280"},
  };
  for (const auto& [bytes, why] : files) {
    INFO(why);
    const auto message = error_of([&] { read_archive(bytes); });
    CHECK_THAT(message, ContainsSubstring(why));
    CHECK((message.starts_with("[npz] x.npz: ") || message.starts_with("[npy] x.npz: ")));
    CHECK(message.find('\n') == std::string::npos);
    CHECK(message.size() < 300);
  }
  // In the directory: a size, an offset and a name's length that lie.
  const auto directory = good.find("PK\1\2");
  const auto lying = [&](size_t at, const std::string& bytes) {
    auto file = good;
    file.replace(directory + at, bytes.size(), bytes);
    return error_of([&] { read_archive(file); });
  };
  CHECK_THAT(lying(20, npz::raw(uint32_t{9000}) + npz::raw(uint32_t{9000})),
             ContainsSubstring("past the file's"));
  CHECK_THAT(lying(24, npz::raw(uint32_t{9})), ContainsSubstring("expected as many bytes stored"));
  CHECK_THAT(lying(42, npz::raw(uint32_t{1})), ContainsSubstring("expected its header at byte 1"));
  CHECK_THAT(lying(42, npz::raw(~uint32_t{0})), ContainsSubstring("expected its header"));
  CHECK_THAT(lying(28, npz::raw(uint16_t{60000})), ContainsSubstring("name takes 60000 bytes"));
  cut_bytes(good, read_archive);
  change_bytes(good, read_archive);
}
