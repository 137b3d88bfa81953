#pragma once

#include <cstdint>
#include <string>
#include <vector>

/// Writes small .npy and .npz files, as NumPy lays them out.
namespace npz {

template <typename T>
std::string raw(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof(value)};
}

/// A .npy file of any header and data.
inline std::string npy(const std::string& header, const std::string& data, char version = 1) {
  const auto length = version == 1 ? raw(static_cast<uint16_t>(header.size()))
                                   : raw(static_cast<uint32_t>(header.size()));
  return std::string("\x93NUMPY") + version + '\0' + length + header + data;
}

inline std::string header(const std::string& descr, const std::string& shape) {
  return "{'descr': '" + descr + "', 'fortran_order': False, 'shape': " + shape + ", }    \n";
}

inline std::string floats(const std::vector<float>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}

/// A member as the directory describes it.
struct Member {
  std::string name = {};
  std::string content = {};
  uint16_t method = 0, flags = 0;
};

/// A zip archive; local headers carry the zip64 extra field that np.savez writes.
inline std::string zip(const std::vector<Member>& members, const std::string& comment = "") {
  std::string file, directory;
  const std::string extra(20, '\1');
  for (const auto& [name, content, method, flags] : members) {
    const auto offset = static_cast<uint32_t>(file.size());
    const auto size = static_cast<uint32_t>(content.size());
    const auto how = raw(flags) + raw(method) + std::string(8, '\0');  // time, date, crc
    file += raw(uint32_t{0x04034b50}) + raw(uint16_t{45}) + how + raw(~uint32_t{0}) +
            raw(~uint32_t{0}) + raw(static_cast<uint16_t>(name.size())) +
            raw(static_cast<uint16_t>(extra.size())) + name + extra + content;
    directory += raw(uint32_t{0x02014b50}) + raw(uint32_t{0}) + how + raw(size) + raw(size) +
                 raw(static_cast<uint16_t>(name.size())) + std::string(12, '\0') + raw(offset) +
                 name;
  }
  const auto count = static_cast<uint16_t>(members.size());
  return file + directory + raw(uint32_t{0x06054b50}) + raw(uint32_t{0}) + raw(count) + raw(count) +
         raw(static_cast<uint32_t>(directory.size())) + raw(static_cast<uint32_t>(file.size())) +
         raw(static_cast<uint16_t>(comment.size())) + comment;
}

}  // namespace npz
