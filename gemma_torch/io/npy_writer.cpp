#include "gemma_torch/io/npy_writer.h"

#include <cstdint>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

std::string descr(at::ScalarType dtype, const std::string& path) {
  switch (dtype) {
    case at::kDouble:
      return "<f8";
    case at::kFloat:
      return "<f4";
    case at::kHalf:
      return "<f2";
    case at::kLong:
      return "<i8";
    case at::kInt:
      return "<i4";
    case at::kByte:
      return "|u1";
    case at::kBool:
      return "|b1";
    default:
      fail("[save_npy] {}: dtype {} has no NumPy form", path, c10::toString(dtype));
  }
}

}  // namespace

void save_npy(const std::string& path, const at::Tensor& tensor) {
  std::string shape;
  for (const auto size : tensor.sizes()) {
    shape += fmt::format("{},", size);
  }
  auto header = fmt::format("{{'descr': '{}', 'fortran_order': False, 'shape': ({}), }}",
                            descr(tensor.scalar_type(), path),
                            shape);
  constexpr size_t kPreamble = 10, kAlignment = 64;  // magic, version, length; where data begins
  const auto length = kPreamble + header.size() + 1;
  header.append((kAlignment - length % kAlignment) % kAlignment, ' ').push_back('\n');
  const auto size = static_cast<uint16_t>(header.size());
  const auto dense = tensor.detach().cpu().contiguous();
  AtomicFile file(path);
  file.write("\x93NUMPY\x01\x00", 8);
  file.write(&size, sizeof(size));  // little-endian, as every machine this runs on
  file.write(header.data(), header.size());
  file.write(dense.const_data_ptr(), dense.nbytes());
  file.commit();
}

}  // namespace gemma_torch
