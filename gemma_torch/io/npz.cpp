#include <algorithm>
#include <bit>
#include <cstring>
#include <string>
#include <string_view>

#include "gemma_torch/base/error.h"
#include "gemma_torch/io/npy.h"

namespace gemma_torch {
namespace {

// Records of the zip format (PKWARE's APPNOTE): the end of the central directory, one entry of it
// for each member, and the header that stands before a member's bytes.
constexpr uint32_t kLocal = 0x04034b50, kEntry = 0x02014b50, kEnd = 0x06054b50;
constexpr size_t kLocalSize = 30, kEntrySize = 46, kEndSize = 22;
constexpr size_t kMaxComment = 0xffff;  // after the end record

struct Member {
  std::string name = {};
  uint16_t flags = 0, method = 0;
  uint64_t packed = 0, size = 0, header = 0;  // bytes; `header` from the file's start
};

class Archive {
 public:
  explicit Archive(const FileBytes& file) : file_(file) {}

  TensorMap read() const {
    const auto end = find_end();
    const auto count = at<uint16_t>(end + 10);
    const uint64_t start = at<uint32_t>(end + 16);
    check(count != 0xffff && start != 0xffffffff,
          "[npz] {}: expected less than 4 GiB and 65,535 members. Hint: safetensors",
          file_.name);
    TensorMap tensors;
    uint64_t place = start;
    for (int i = 0; i < count; ++i) {
      check(place + kEntrySize <= end && at<uint32_t>(place) == kEntry,
            "[npz] {}: expected entry {} of {} at byte {}",
            file_.name,
            i + 1,
            count,
            place);
      const auto member = member_at(place, end);
      const auto added = tensors.emplace(array_name(member), array_of(member));
      check(added.second, "[npz] {}: {} appears twice", file_.name, printable(member.name));
      place += kEntrySize + at<uint16_t>(place + 28) + at<uint16_t>(place + 30) +
               at<uint16_t>(place + 32);
    }
    check(place == end, "[npz] {}: its directory ends at {}, not at {}", file_.name, place, end);
    return tensors;
  }

 private:
  template <typename T>
  T at(uint64_t place) const {  // checked by the callers to lie inside the file
    T value = {};
    std::memcpy(&value, file_.data + place, sizeof(T));
    return value;
  }

  std::string_view text(uint64_t place, uint64_t length) const {
    return {reinterpret_cast<const char*>(file_.data) + place, length};
  }

  uint64_t find_end() const {
    const auto last = file_.size >= kEndSize ? file_.size - kEndSize : 0;
    for (uint64_t back = 0; file_.size >= kEndSize && back <= std::min(last, kMaxComment); ++back) {
      const auto place = last - back;
      if (at<uint32_t>(place) == kEnd && at<uint16_t>(place + 20) == back) {
        return place;
      }
    }
    fail("[npz] {}: no end of a zip archive found. Hint: the file may be cut short", file_.name);
  }

  Member member_at(uint64_t place, uint64_t end) const {
    const auto length = at<uint16_t>(place + 28);
    check(length <= end - place - kEntrySize,
          "[npz] {}: a member's name takes {} bytes, past its directory's end",
          file_.name,
          length);
    return {.name = std::string(text(place + kEntrySize, length)),
            .flags = at<uint16_t>(place + 8),
            .method = at<uint16_t>(place + 10),
            .packed = at<uint32_t>(place + 20),
            .size = at<uint32_t>(place + 24),
            .header = at<uint32_t>(place + 42)};
  }

  std::string array_name(const Member& member) const {
    constexpr std::string_view kEnding = ".npy";
    check(member.name.size() > kEnding.size() && member.name.ends_with(kEnding),
          "[npz] {}: expected members called NAME.npy, got {}",
          file_.name,
          printable(member.name));
    return member.name.substr(0, member.name.size() - kEnding.size());
  }

  at::Tensor array_of(const Member& member) const {
    const auto where = file_.name + ": " + printable(member.name);
    check((member.flags & 1) == 0, "[npz] {}: expected no encryption", where);
    check(member.method == 0,
          "[npz] {}: expected a stored member, got compression method {}. Hint: np.savez instead "
          "of np.savez_compressed",
          where,
          member.method);
    check(member.packed == member.size && member.size != 0xffffffff,
          "[npz] {}: expected as many bytes stored as there are, got {} and {}",
          where,
          member.packed,
          member.size);
    check(member.header + kLocalSize <= file_.size && at<uint32_t>(member.header) == kLocal,
          "[npz] {}: expected its header at byte {}",
          where,
          member.header);
    const auto start = member.header + kLocalSize + at<uint16_t>(member.header + 26) +
                       at<uint16_t>(member.header + 28);
    check(start <= file_.size && member.size <= file_.size - start,
          "[npz] {}: {} bytes from {} on lie past the file's {}. Hint: the file may be cut short",
          where,
          member.size,
          start,
          file_.size);
    return read_npy({.owner = file_.owner,
                     .data = file_.data + start,
                     .size = static_cast<size_t>(member.size),
                     .name = where});
  }

  const FileBytes& file_;
};

}  // namespace

bool is_zip(const FileBytes& file) {
  uint32_t magic = 0;
  if (file.size >= sizeof(magic)) {
    std::memcpy(&magic, file.data, sizeof(magic));
  }
  return magic == kLocal || magic == kEnd;  // an empty archive has no member
}

TensorMap read_npz(const FileBytes& file) {
  return Archive(file).read();
}

TensorMap load_npz(const std::string& path) {
  return read_npz(map_file(path));
}

}  // namespace gemma_torch
