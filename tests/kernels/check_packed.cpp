// The encoder of lossless cells, against one that is written out number by number.

#include "matrices.h"

namespace gemma_torch::kernels::test {
namespace {

struct Cell {
  std::vector<uint8_t> bytes;
  std::vector<Exception> exceptions;
  uint8_t exponent = 0;
};

int upper_exponent(Bf16 x) {
  return x.bits >> 8 & 0x7f;
}

// The lowest base with which the most numbers have a code.
int best_base(const Bf16* const* rows, int64_t columns) {
  int best = 0;
  int64_t most = -1;
  for (int base = 0; base + 7 < 128; ++base) {
    int64_t coded = 0;
    for (int64_t i = 0; i < kBlockRows * columns; ++i) {
      const Bf16* row = rows[i / columns];
      const int above = row == nullptr ? 0 : upper_exponent(row[i % columns]) - base;
      coded += above >= 1 && above <= 7 ? 1 : 0;
    }
    if (coded > most) {
      most = coded;
      best = base;
    }
  }
  return best;
}

// As the layout in packed.h says.
Cell encode_plainly(const Bf16* const* rows, int64_t columns) {
  const int base = best_base(rows, columns);
  Cell cell{std::vector<uint8_t>(static_cast<size_t>(cell_bytes(Format::kLossless12, columns))),
            {},
            static_cast<uint8_t>(base)};
  for (int64_t j = 0; j < columns; j += 8) {
    uint8_t* step = cell.bytes.data() + j * 24;
    for (int64_t r = 0; r < kBlockRows; ++r) {
      for (int64_t c = 0; c < 8; ++c) {
        const Bf16 x = rows[r] == nullptr ? Bf16{0} : rows[r][j + c];
        const int upper = upper_exponent(x);
        if (upper != 0 && (upper <= base || upper > base + 7)) {
          cell.exceptions.push_back(
              {3, static_cast<uint16_t>(j + c), static_cast<uint8_t>(r), 0, x, 0});
          continue;
        }
        const int code = upper == 0 ? 0 : upper - base;
        const int64_t place = 64 * (c / 4) + 16 * (r / 4) + 8 * (c / 2 % 2) + 2 * (r % 4) + c % 2;
        step[place] = static_cast<uint8_t>(x.bits & 0xff);
        step[128 + place % 64] = static_cast<uint8_t>(
            step[128 + place % 64] | (x.bits >> 15 << 3 | code) << (place < 64 ? 0 : 4));
      }
    }
  }
  return cell;
}

void compare_cell(Check& check, const Bf16* const* rows, int64_t columns) {
  const auto want = encode_plainly(rows, columns);
  Cell got{std::vector<uint8_t>(want.bytes.size(), 0xa5), {}, 0};  // what was there before is gone
  got.exponent = encode_lossless(rows, columns, got.bytes.data(), got.exceptions, 3);
  check.same(got.exponent, want.exponent);
  check.same(got.bytes, want.bytes);
  check.same(got.exceptions, want.exceptions);
}

}  // namespace

void check_packed(Report& report) {
  report.check("encode_lossless gives the cells of the plain encoder", [](Check& check) {
    Random random(11);
    for (const int64_t columns : {64, 128, 640}) {
      for (int round = 0; round < 24; ++round) {
        auto w = awkward_weights(random, kBlockRows * columns, round % 2 == 0 ? 4 : 512);
        if (round % 3 == 0) {  // any bits
          for (auto& x : w) {
            x.bits = static_cast<uint16_t>(random.bits() & (round == 0 ? 0xffff : 0x8fff));
          }
        }
        const Bf16* rows[kBlockRows];
        for (int64_t r = 0; r < kBlockRows; ++r) {
          const bool absent = round % 4 == 3 && random.below(3) == 0;
          rows[r] = absent ? nullptr : w.data() + r * columns;
        }
        compare_cell(check, rows, columns);
      }
    }
    const Bf16* nothing[kBlockRows] = {};
    compare_cell(check, nothing, 64);
  });
}

}  // namespace gemma_torch::kernels::test
