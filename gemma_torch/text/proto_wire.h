#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace gemma_torch {

// The wire format of protocol buffers, as much of it as sentencepiece's model file uses. Source:
// the encoding page of protobuf.dev.

/// Appends fields to a message.
class ProtoWriter {
 public:
  void varint(uint32_t field, uint64_t value);
  void float32(uint32_t field, float value);
  void bytes(uint32_t field, std::string_view value);  // a string or a nested message
  void clear() { message_.clear(); }
  const std::string& message() const { return message_; }

 private:
  void tag(uint32_t field, uint32_t wire_type);
  void raw_varint(uint64_t value);

  std::string message_;
};

/// One field of a message. Exactly one of the values is set, by the wire type.
struct ProtoField {
  enum class Wire { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };
  uint32_t number = 0;
  Wire wire = Wire::kVarint;
  uint64_t value = 0;           // kVarint, kFixed32, kFixed64
  std::string_view bytes = {};  // kBytes: inside the bytes that were given to the reader

  /// The value as the named kind. Throws: Error naming the field if the wire type is another.
  uint64_t as_varint() const;
  float as_float32() const;
  std::string_view as_bytes() const;
};

/// Walks the fields of a message in order. Throws: Error naming the byte offset where the bytes are
/// truncated, a length reaches past the end, a varint is too long, or a wire type is unknown.
class ProtoReader {
 public:
  explicit ProtoReader(std::string_view message) : message_(message) {}

  bool next(ProtoField& field);  // false at the end

 private:
  uint64_t raw_varint();
  std::string_view take(uint64_t count);
  uint64_t little_endian(size_t count);

  std::string_view message_;
  size_t at_ = 0;
};

}  // namespace gemma_torch
