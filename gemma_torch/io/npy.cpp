#include "gemma_torch/io/npy.h"

#include <ATen/ops/empty.h>

#include <bit>
#include <charconv>
#include <cstring>
#include <string_view>
#include <vector>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

static_assert(std::endian::native == std::endian::little, "npy data is read as it lies");

constexpr std::string_view kMagic = "\x93NUMPY";
constexpr size_t kMaxRank = 32;  // numpy's own limit

template <typename T>
T number_at(const FileBytes& file, size_t at, const char* what) {
  check(at <= file.size && sizeof(T) <= file.size - at,
        "[npy] {}: {} at byte {} lies past the file's {} bytes. Hint: the file may be cut short",
        file.name,
        what,
        at,
        file.size);
  T value = {};
  std::memcpy(&value, file.data + at, sizeof(T));
  return value;
}

// Reads the header's Python literal: {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }.
class HeaderReader {
 public:
  HeaderReader(std::string_view text, const std::string& file) : text_(text), file_(file) {}

  c10::ScalarType dtype = c10::kFloat;
  std::vector<int64_t> shape = {};

  void read() {
    expect("{");
    for (int keys = 0; !next_is("}"); ++keys) {
      check(keys < 3, "[npy] {}: header: expected three keys, got more", file_);
      const auto key = quoted();
      expect(":");
      read_value(key);
      next_is(",");
    }
    check(seen_ == 7, "[npy] {}: header: expected descr, fortran_order and shape", file_);
    skip_blanks();
    check(text_.empty(), "[npy] {}: header: expected its end, got {}", file_, printable(text_));
  }

 private:
  void read_value(std::string_view key) {
    if (key == "descr") {
      read_dtype();
      seen_ |= 1;
    } else if (key == "fortran_order") {
      check(next_is("False"),
            "[npy] {}: expected C order, got Fortran order. Hint: np.ascontiguousarray(..)",
            file_);
      seen_ |= 2;
    } else if (key == "shape") {
      read_shape();
      seen_ |= 4;
    } else {
      fail("[npy] {}: header: unknown key {}", file_, printable(key));
    }
  }

  void read_dtype() {
    skip_blanks();
    check(text_.starts_with('\''), "[npy] {}: expected plain numbers, got records", file_);
    const auto name = quoted();
    check(name == "<f2" || name == "<f4" || name == "<f8",
          "[npy] {}: expected float16, float32 or float64 (<f2, <f4, <f8), got {}",
          file_,
          printable(name));
    dtype = name == "<f2" ? c10::kHalf : name == "<f4" ? c10::kFloat : c10::kDouble;
  }

  void read_shape() {
    expect("(");
    while (!next_is(")")) {
      skip_blanks();
      int64_t size = -1;
      const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), size);
      check(error == std::errc() && size >= 0 && shape.size() < kMaxRank,
            "[npy] {}: shape: expected at most {} sizes of 0 or more, got {}",
            file_,
            kMaxRank,
            printable(text_));
      text_.remove_prefix(static_cast<size_t>(end - text_.data()));
      shape.push_back(size);
      check(next_is(",") || text_.starts_with(')'), "[npy] {}: shape: expected a comma", file_);
    }
  }

  std::string_view quoted() {
    expect("'");
    const auto end = text_.find('\'');
    check(end != std::string_view::npos, "[npy] {}: header: a quote is not closed", file_);
    const auto word = text_.substr(0, end);
    text_.remove_prefix(end + 1);
    return word;
  }

  void skip_blanks() {
    const auto first = text_.find_first_not_of(" \n");
    text_.remove_prefix(first == std::string_view::npos ? text_.size() : first);
  }

  // Takes `word` if it comes next.
  bool next_is(std::string_view word) {
    skip_blanks();
    const bool found = text_.starts_with(word);
    text_.remove_prefix(found ? word.size() : 0);
    return found;
  }

  void expect(std::string_view word) {
    check(next_is(word), "[npy] {}: header: expected {}, got {}", file_, word, printable(text_));
  }

  std::string_view text_;
  const std::string& file_;
  int seen_ = 0;  // a bit for each key
};

// Bytes of the numbers; fails where that wraps.
uint64_t bytes_of(const HeaderReader& header, const std::string& file) {
  uint64_t bytes = c10::elementSize(header.dtype);
  for (const auto size : header.shape) {
    check(!__builtin_mul_overflow(bytes, static_cast<uint64_t>(size), &bytes) &&
              bytes <= uint64_t{1} << 62,
          "[npy] {}: shape {} is too large",
          file,
          shape_str(header.shape));
  }
  return bytes;
}

}  // namespace

at::Tensor read_npy(const FileBytes& file) {
  check(file.size >= kMagic.size() + 2 && std::memcmp(file.data, kMagic.data(), kMagic.size()) == 0,
        "[npy] {}: expected a .npy file, which begins with \\x93NUMPY",
        file.name);
  const auto version = number_at<uint8_t>(file, 6, "the version");
  check(version >= 1 && version <= 3,
        "[npy] {}: expected version 1, 2 or 3, got {}",
        file.name,
        version);
  const size_t start = version == 1 ? 10 : 12;  // of the header's text
  const size_t length = version == 1 ? number_at<uint16_t>(file, 8, "the header's length")
                                     : number_at<uint32_t>(file, 8, "the header's length");
  check(start <= file.size && length <= file.size - start,
        "[npy] {}: header of {} bytes, the file has {}. Hint: the file may be cut short",
        file.name,
        length,
        file.size);
  HeaderReader header({reinterpret_cast<const char*>(file.data) + start, length}, file.name);
  header.read();
  const auto bytes = bytes_of(header, file.name);
  check(bytes == file.size - start - length,
        "[npy] {}: expected {} bytes for {} {}, got {}. Hint: the file may be cut short",
        file.name,
        bytes,
        c10::toString(header.dtype),
        shape_str(header.shape),
        file.size - start - length);
  auto tensor = at::empty(header.shape, header.dtype);
  if (bytes > 0) {
    std::memcpy(tensor.data_ptr(), file.data + start + length, bytes);
  }
  return tensor;
}

}  // namespace gemma_torch
