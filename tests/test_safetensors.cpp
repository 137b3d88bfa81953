#include "gemma_torch/io/safetensors.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <cstring>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/io/safetensors_writer.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/scratch.h"

using namespace gemma_torch;
using Catch::Matchers::ContainsSubstring;

namespace {

/// A file of this header and `data_bytes` bytes 0, 1, 2, ..
FileBytes raw_file(const std::string& header, size_t data_bytes) {
  const uint64_t length = header.size();
  std::string bytes(reinterpret_cast<const char*>(&length), sizeof(length));
  bytes += header;
  for (size_t i = 0; i < data_bytes; ++i) {
    bytes += static_cast<char>(i);
  }
  return copy_bytes(bytes, "raw.safetensors");
}

bool same(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) {
    return false;
  }
  const auto dense = b.contiguous();
  return a.numel() == 0 || std::memcmp(a.data_ptr(), dense.data_ptr(), a.nbytes()) == 0;
}

}  // namespace

TEST_CASE("tensors of every dtype come back bit for bit", "[safetensors]") {
  const ScratchFolder folder("gemma_safetensors");
  TensorMap tensors;
  for (const auto dtype : {at::kDouble,
                           at::kFloat,
                           at::kHalf,
                           at::kBFloat16,
                           at::kLong,
                           at::kInt,
                           at::kShort,
                           at::kChar,
                           at::kByte,
                           at::kBool,
                           at::kUInt16,
                           at::kUInt32,
                           at::kUInt64,
                           at::kFloat8_e4m3fn,
                           at::kFloat8_e5m2}) {
    tensors[fmt::format("t.{}", c10::toString(dtype))] = at::arange(7, at::kFloat).to(dtype);
  }
  tensors["scalar"] = at::full({}, 2.5F);
  tensors["none"] = at::empty({0, 3});
  save_safetensors(folder / "x.safetensors", tensors, {{"format", "pt"}, {"quote", "\"\n\u00e9"}});
  const auto back = load_safetensors(folder / "x.safetensors");
  REQUIRE(back.size() == tensors.size());
  for (const auto& [name, tensor] : tensors) {
    INFO(name);
    CHECK(same(tensor, back.at(name)));
  }
  CHECK(load_safetensors_metadata(folder / "x.safetensors") ==
        Metadata{{"format", "pt"}, {"quote", "\"\n\u00e9"}});
}

TEST_CASE("a file with nothing in it is a file", "[safetensors]") {
  const ScratchFolder folder("gemma_safetensors_empty");
  save_safetensors(folder / "x.safetensors", {});
  CHECK(load_safetensors(folder / "x.safetensors").empty());
  CHECK(load_safetensors_metadata(folder / "x.safetensors").empty());
}

TEST_CASE("saving takes strided tensors and gives the same bytes again", "[safetensors]") {
  const ScratchFolder folder("gemma_safetensors_save");
  const auto table = at::arange(12, at::kFloat).view({3, 4});
  const TensorMap tensors = {{"a", at::ones({3}, at::kByte)}, {"b", table.t()}, {"c", table[1]}};
  save_safetensors(folder / "x.safetensors", tensors);
  save_safetensors(folder / "y.safetensors", load_safetensors(folder / "x.safetensors"));
  CHECK(read_file(folder / "x.safetensors") == read_file(folder / "y.safetensors"));
  const auto back = load_safetensors(folder / "x.safetensors");
  CHECK(same(back.at("b"), table.t()));
  CHECK(same(back.at("c"), table[1]));
  CHECK(reinterpret_cast<uintptr_t>(back.at("b").data_ptr()) % 64 == 0);
  // Bytes after floats: the other way round, "b" would be misaligned and have to be copied.
  CHECK(back.at("a").data_ptr<uint8_t>() ==
        static_cast<uint8_t*>(back.at("c").data_ptr()) + back.at("c").nbytes());
}

TEST_CASE("loaded tensors outlive the map and writes stay private", "[safetensors]") {
  const ScratchFolder folder("gemma_safetensors_private");
  save_safetensors(folder / "x.safetensors", {{"w", at::ones({4})}, {"v", at::zeros({4})}});
  const auto before = read_file(folder / "x.safetensors");
  auto w = load_safetensors(folder / "x.safetensors").at("w");
  w.mul_(3);
  CHECK(same(w, at::full({4}, 3.0F)));
  CHECK(read_file(folder / "x.safetensors") == before);
}

TEST_CASE("tensors share one mapping unless their bytes are misaligned", "[safetensors]") {
  // The header is 8 + 122 = 130 bytes, so data begins at an address that is even and no multiple
  // of 4.
  std::string header =
      R"({"h":{"dtype":"I16","shape":[1],"data_offsets":[0,2]},"f":{"dtype":"I32","shape":[1],"data_offsets":[2,6]},)";
  header += R"("g":{"dtype":"I32","shape":[1],"data_offsets":[6,10]}})";
  header.append((8 - header.size() % 8) % 8, ' ');
  const auto file = raw_file(header, 10);
  const auto tensors = read_safetensors(file);
  const auto* data = file.data + 8 + header.size();
  CHECK(tensors.at("h").data_ptr() == data);
  CHECK(tensors.at("f").data_ptr() != data + 2);
  CHECK(tensors.at("f").item<int32_t>() == 0x05040302);
  CHECK(tensors.at("g").item<int32_t>() == 0x09080706);
}

TEST_CASE("a broken header is refused by name", "[safetensors]") {
  const auto message = [](const std::string& header, size_t data_bytes) {
    return error_of([&] { read_safetensors(raw_file(header, data_bytes)); });
  };
  CHECK_THAT(message(R"({"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}})", 3),
             ContainsSubstring("a (raw.safetensors)") && ContainsSubstring("cut short"));
  CHECK_THAT(message(R"({"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}})", 5),
             ContainsSubstring("5 bytes of data, tensors cover 4"));
  CHECK_THAT(message(R"({"a":{"dtype":"I16","shape":[4],"data_offsets":[0,4]}})", 4),
             ContainsSubstring("expected 8 bytes for Short (4)"));
  CHECK_THAT(message(R"({"a":{"dtype":"Q4","shape":[4],"data_offsets":[0,4]}})", 4),
             ContainsSubstring("unsupported dtype \"Q4\""));
  CHECK_THAT(message(R"({"a":{"dtype":"I8","shape":[-4],"data_offsets":[0,4]}})", 4),
             ContainsSubstring("in shape, got -4"));
  CHECK_THAT(
      message(R"({"a":{"dtype":"F32","shape":[4611686018427387904,2],"data_offsets":[0,0]}})", 0),
      ContainsSubstring("more than 2^63 bytes"));
  CHECK_THAT(message(R"({"a":{"dtype":"BOOL","shape":[4],"data_offsets":[0,4]}})", 4),
             ContainsSubstring("BOOL"));
  CHECK_THAT(message(R"({"a":1,"a":2})", 0), ContainsSubstring("\"a\" appears twice"));
  CHECK_THAT(message(R"({"a":[[[[]]]]})", 0), ContainsSubstring("nesting"));
  CHECK_THAT(message(R"({"__metadata__":{"k":1}})", 0),
             ContainsSubstring("expected a string for k"));
  CHECK_THAT(message(R"({"a\nb":1})", 0), ContainsSubstring("a\\x0ab (raw.safetensors)"));
}

TEST_CASE("overlap and gaps between tensors are refused", "[safetensors]") {
  const std::string a = R"({"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]},)";
  CHECK_THROWS_WITH(
      read_safetensors(raw_file(a + R"("b":{"dtype":"I8","shape":[4],"data_offsets":[2,6]}})", 6)),
      ContainsSubstring("b (raw.safetensors): expected its data at 4") &&
          ContainsSubstring("got 2"));
  CHECK_THROWS_WITH(
      read_safetensors(raw_file(a + R"("b":{"dtype":"I8","shape":[4],"data_offsets":[5,9]}})", 9)),
      ContainsSubstring("expected its data at 4") && ContainsSubstring("got 5"));
}

TEST_CASE("what has no safetensors form is not written", "[safetensors]") {
  const ScratchFolder folder("gemma_safetensors_refuse");
  const auto path = folder / "x.safetensors";
  CHECK_THROWS_WITH(save_safetensors(path, {{"z", at::zeros({1}, at::kComplexFloat)}}),
                    ContainsSubstring("z (") && ContainsSubstring("ComplexFloat"));
  CHECK_THROWS_AS(save_safetensors(path, {{"z", at::Tensor()}}), Error);
  CHECK_THROWS_AS(save_safetensors(path, {{"__metadata__", at::ones({1})}}), Error);
  CHECK_THROWS_AS(save_safetensors(path, {{"\xff", at::ones({1})}}), Error);
  CHECK_THROWS_WITH(save_safetensors(folder / "no/x", {}), ContainsSubstring("no/x"));
  CHECK(std::filesystem::is_empty(folder.path()));
}

TEST_CASE("a writer takes parts in order and makes the file that saving makes", "[safetensors]") {
  const ScratchFolder folder("gemma_safetensors_writer");
  const auto table = at::arange(12, at::kFloat).view({3, 4});
  const std::vector<TensorSpec> specs = {
      {"ids", at::kLong, {2}}, {"none", at::kFloat, {0, 3}}, {"table", at::kFloat, {3, 4}}};
  SafetensorsWriter writer(folder / "x", specs, {{"k", "v"}});
  writer.write("ids", at::arange(2));
  writer.write("none", at::empty({0, 3}));
  writer.write("table", table.narrow(/*dim=*/0, 0, 1));
  writer.write("table", table.t().narrow(/*dim=*/1, 1, 2).t());  // strided
  writer.commit();
  const TensorMap tensors = {{"ids", at::arange(2)}, {"none", at::empty({0, 3})}, {"table", table}};
  save_safetensors(folder / "y", tensors, {{"k", "v"}});
  CHECK(read_file(folder / "x") == read_file(folder / "y"));
  CHECK(writer.bytes() == std::filesystem::file_size(folder / "x"));
}

TEST_CASE("a kept file goes on where its next writer is told, whatever lies behind",
          "[safetensors]") {
  const ScratchFolder folder("gemma_safetensors_part");
  const auto path = folder / "x", part = part_path(path);
  const auto table = at::arange(12, at::kFloat).view({3, 4});
  const std::vector<TensorSpec> specs = {{"ids", at::kLong, {2}}, {"table", at::kFloat, {3, 4}}};
  {
    SafetensorsWriter writer(path, specs, {}, Unfinished::kKept);
    writer.write("ids", at::arange(2));
    writer.write("table", table.narrow(/*dim=*/0, 0, 1));
    writer.write("table", at::zeros({4}));
  }
  CHECK_FALSE(std::filesystem::exists(path));
  for (const size_t tail : {0, 7, 100}) {  // 100: longer than the whole file
    const auto kept = read_file(part);
    write_file(part, kept + std::string(tail, 'x'));
    SafetensorsWriter writer(path, specs, {}, Unfinished::kKept);
    writer.write("ids", at::arange(2));
    CHECK_THROWS_WITH(writer.skip("ids", 1), ContainsSubstring("expected table"));
    CHECK_THROWS_WITH(writer.skip("table", 13), ContainsSubstring("at most 12 values, got 13"));
    CHECK_THROWS_WITH(writer.skip("table", -1), ContainsSubstring("at most 12 values, got -1"));
    writer.skip("table", 4);
    writer.write("table", table.narrow(/*dim=*/0, 1, 2));
    writer.commit();
    CHECK_FALSE(std::filesystem::exists(part));
    CHECK(writer.bytes() == std::filesystem::file_size(path));
    save_safetensors(folder / "y", {{"ids", at::arange(2)}, {"table", table}});
    CHECK(read_file(path) == read_file(folder / "y"));
    write_file(part, kept);
  }
  std::filesystem::remove(part);
  SafetensorsWriter writer(path, specs, {}, Unfinished::kKept);
  writer.write("ids", at::arange(2));
  CHECK_THROWS_WITH(writer.skip("table", 4),
                    ContainsSubstring(part + ": expected the first ") &&
                        ContainsSubstring(" bytes of an earlier run, got "));
}

TEST_CASE("a writer refuses what its header does not say", "[safetensors]") {
  const ScratchFolder folder("gemma_safetensors_writer_refuses");
  using Specs = std::vector<TensorSpec>;
  const auto refused = [&](const Specs& specs) {
    return error_of([&] { SafetensorsWriter(folder / "x", specs); });
  };
  CHECK_THAT(refused({{"a", at::kByte, {1}}, {"b", at::kFloat, {1}}}),
             ContainsSubstring("b (") && ContainsSubstring("widest dtypes first, got Float"));
  CHECK_THAT(refused({{"a", at::kByte, {1}}, {"a", at::kByte, {1}}}),
             ContainsSubstring("a (") && ContainsSubstring("appears twice"));
  const Metadata long_text = {{"k", std::string(100'000'001, 'x')}};
  CHECK_THROWS_WITH(SafetensorsWriter(folder / "x", {}, long_text),
                    ContainsSubstring("expected a header of at most 100000000 bytes"));
  {
    SafetensorsWriter writer(folder / "x", {{"a", at::kFloat, {2}}, {"b", at::kFloat, {1}}});
    CHECK_THROWS_WITH(writer.write("b", at::ones({1})), ContainsSubstring("expected a"));
    CHECK_THROWS_WITH(writer.write("a", at::ones({3})),
                      ContainsSubstring("expected 2 values of Float, got 3 of Float"));
    CHECK_THROWS_WITH(writer.write("a", at::ones({2}, at::kInt)), ContainsSubstring("of Int"));
    writer.write("a", at::ones({1}));
    CHECK_THROWS_WITH(writer.write("a", at::ones({2})), ContainsSubstring("expected 1 values"));
    CHECK_THROWS_WITH(writer.commit(), ContainsSubstring("a (") && ContainsSubstring("not all"));
    writer.write("a", at::ones({1}));
    writer.write("b", at::ones({1}));
    CHECK_THROWS_WITH(writer.write("c", at::ones({1})), ContainsSubstring("nothing more"));
  }
  CHECK(std::filesystem::is_empty(folder.path()));
}

TEST_CASE("shards give every tensor once and only where the index says", "[safetensors]") {
  const ScratchFolder folder("gemma_safetensors_shards");
  save_safetensors(folder / "one", {{"a", at::ones({1})}, {"b", at::zeros({2})}});
  save_safetensors(folder / "two", {{"c", at::ones({3})}});
  const auto load = [&](const std::string& map) {
    write_file(folder / "index.json", R"({"metadata":{},"weight_map":{)" + map + "}}");
    return load_sharded_safetensors(folder / "index.json");
  };
  const auto all = load(R"("a":"one","b":"one","c":"two")");
  CHECK(all.size() == 3);
  CHECK(all.at("c").size(0) == 3);
  CHECK_THROWS_WITH(load(R"("a":"one","c":"two")"),
                    ContainsSubstring("b: in shard one, the index says nothing"));
  CHECK_THROWS_WITH(load(R"("a":"one","b":"two","c":"two")"),
                    ContainsSubstring("b: in shard one, the index says two"));
  CHECK_THROWS_WITH(load(R"("a":"one","b":"one","c":"two","d":"two")"),
                    ContainsSubstring("d: expected in shard two"));
  CHECK_THROWS_WITH(load(R"("a":"one","b":"one","c":"../two")"),
                    ContainsSubstring("plain file name"));
  CHECK_THROWS_WITH(load(R"("a":"one","b":"one","c":"three")"), ContainsSubstring("three"));
  CHECK_THROWS_WITH(load(R"("a":"one","a":"one","b":"one","c":"two")"), ContainsSubstring("twice"));
}
