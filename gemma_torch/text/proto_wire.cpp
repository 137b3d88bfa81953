#include "gemma_torch/text/proto_wire.h"

#include <bit>

#include "gemma_torch/base/error.h"

namespace gemma_torch {

using Wire = ProtoField::Wire;

void ProtoWriter::raw_varint(uint64_t value) {
  for (; value >= 0x80; value >>= 7) {
    message_.push_back(static_cast<char>(value | 0x80));
  }
  message_.push_back(static_cast<char>(value));
}

void ProtoWriter::tag(uint32_t field, uint32_t wire_type) {
  raw_varint((uint64_t{field} << 3) | wire_type);
}

void ProtoWriter::varint(uint32_t field, uint64_t value) {
  tag(field, static_cast<uint32_t>(Wire::kVarint));
  raw_varint(value);
}

void ProtoWriter::float32(uint32_t field, float value) {
  tag(field, static_cast<uint32_t>(Wire::kFixed32));
  const auto bits = std::bit_cast<uint32_t>(value);
  for (int shift = 0; shift < 32; shift += 8) {
    message_.push_back(static_cast<char>(bits >> shift));
  }
}

void ProtoWriter::bytes(uint32_t field, std::string_view value) {
  tag(field, static_cast<uint32_t>(Wire::kBytes));
  raw_varint(value.size());
  message_.append(value);
}

uint64_t ProtoField::as_varint() const {
  check(wire == Wire::kVarint, "[protobuf] field {}: expected a number", number);
  return value;
}

float ProtoField::as_float32() const {
  check(wire == Wire::kFixed32, "[protobuf] field {}: expected a 32-bit float", number);
  return std::bit_cast<float>(static_cast<uint32_t>(value));
}

std::string_view ProtoField::as_bytes() const {
  check(wire == Wire::kBytes, "[protobuf] field {}: expected a string or a message", number);
  return bytes;
}

uint64_t ProtoReader::raw_varint() {
  uint64_t value = 0;
  for (int shift = 0; shift < 70; shift += 7) {
    const auto byte = static_cast<uint8_t>(take(1)[0]);
    check(shift < 63 || byte <= 1, "[protobuf] a number above 64 bits at byte {}", at_ - 1);
    value |= static_cast<uint64_t>(byte & 0x7F) << shift;
    if (byte < 0x80) {
      return value;
    }
  }
  fail("[protobuf] a number above 64 bits at byte {}", at_);
}

std::string_view ProtoReader::take(uint64_t count) {
  check(count <= message_.size() - at_,
        "[protobuf] expected {} bytes at byte {} of a message, got {}",
        count,
        at_,
        message_.size() - at_);
  const auto taken = message_.substr(at_, count);
  at_ += count;
  return taken;
}

uint64_t ProtoReader::little_endian(size_t count) {
  const auto taken = take(count);
  uint64_t value = 0;
  for (size_t i = 0; i < count; ++i) {
    value |= static_cast<uint64_t>(static_cast<uint8_t>(taken[i])) << (8 * i);
  }
  return value;
}

bool ProtoReader::next(ProtoField& field) {
  if (at_ == message_.size()) {
    return false;
  }
  const size_t start = at_;
  const uint64_t tag = raw_varint();
  check(tag >> 3 != 0 && tag >> 3 < (1U << 29),
        "[protobuf] field number {} at byte {}",
        tag >> 3,
        start);
  field = {.number = static_cast<uint32_t>(tag >> 3), .wire = static_cast<Wire>(tag & 7)};
  switch (field.wire) {
    case Wire::kVarint:
      field.value = raw_varint();
      break;
    case Wire::kFixed64:
      field.value = little_endian(8);
      break;
    case Wire::kBytes:
      field.bytes = take(raw_varint());
      break;
    case Wire::kFixed32:
      field.value = little_endian(4);
      break;
    default:
      fail("[protobuf] wire type {} at byte {}", tag & 7, start);
  }
  return true;
}

}  // namespace gemma_torch
