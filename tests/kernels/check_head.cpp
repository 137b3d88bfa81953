// The output head: exact rows, the scan of all rows, and the bound that the scan gives.

#include "gemma_torch/kernels/cpu/head_scan.h"

#include <algorithm>
#include <numeric>

#include "check.h"

namespace gemma_torch::kernels::test {
namespace {

size_t index(int64_t i) {
  return static_cast<size_t>(i);
}

constexpr int64_t kLonely = 4;  // the row that has one number only

struct Table {
  int64_t rows, columns;
  std::vector<Bf16> w;         // (rows, columns)
  std::vector<int32_t> order;  // of the columns, as the scan has them
};

Table make_table(int64_t rows, int64_t columns) {
  Random random(static_cast<uint64_t>(rows + columns));
  Table table{rows,
              columns,
              std::vector<Bf16>(index(rows * columns)),
              std::vector<int32_t>(index(columns))};
  for (int64_t i = 0; i < rows * columns; ++i) {
    const float row_scale = 0.02F + 0.001F * static_cast<float>(i / columns % 37);
    table.w[index(i)] = to_bf16(random.normal() * (random.below(300) == 0 ? 5 : 1) * row_scale);
  }
  for (int64_t i = 0; i < columns; ++i) {
    table.w[index(3 * columns + i)] = {0};  // a row of zeros
    table.w[index(kLonely * columns + i)] = to_bf16(i == 40 ? 1.0F : 0.0F);
  }
  std::iota(table.order.begin(), table.order.end(), 0);
  for (int64_t i = columns - 1; i > 0; --i) {
    std::swap(table.order[index(i)], table.order[index(random.below(i + 1))]);
  }
  return table;
}

struct Scan {
  HeadScan head;
  std::vector<uint8_t> blocks, residuals;
};

void encode(const FusedKernels& kernels, const Table& table, Scan& scan) {
  auto& head = scan.head;
  head.rows = (table.rows + 15) / 16 * 16;
  head.columns = table.columns;
  head.order = table.order.data();
  scan.blocks.resize(index(head.rows / 16 * head.stride()));
  head.blocks = scan.blocks.data();
  scan.residuals.resize(index(head.residual_bytes()));
  head.residuals = scan.residuals.data();
  std::vector<float> scratch(index(5 * table.columns));
  for (int64_t b = 0; b < head.rows / 16; ++b) {
    const Bf16* rows[16] = {};
    for (int64_t r = 0; r < 16 && b * 16 + r < table.rows; ++r) {
      rows[r] = table.w.data() + (b * 16 + r) * table.columns;
    }
    const float norm = kernels.encode_scan(rows,
                                           table.order.data(),
                                           table.columns,
                                           scan.blocks.data() + b * head.stride(),
                                           scan.residuals.data() + 16 * b * head.major_bytes(),
                                           scan.residuals.data() + head.other_at(16 * b),
                                           scratch.data());
    head.largest_norm = std::max(head.largest_norm, norm);
  }
}

// rho or sigma of a row.
struct DecodedResidual {
  double step;
  double nearer[2];            // how much of the errors it takes away
  std::vector<double> values;  // zeros for the outliers
};

// A row as the layout in head_scan.h says.
struct DecodedRow {
  std::vector<double> w;                 // in the order of the scan
  double outlier_error, rest_errors[2];  // of the larger columns of the rest, and of the smaller
  DecodedResidual rho, sigma;
};

// Which of the two column j of the rest is of.
size_t part_of(const HeadScan& head, int64_t j) {
  return j < kScanOutliers + head.major_columns() ? 0 : 1;
}

// Where its bits stand in a residual of both parts.
int64_t residual_byte(const HeadScan& head, int64_t j) {
  const int64_t n = j - kScanOutliers, major = head.major_columns();
  return n < major ? 8 + n / 4 : head.major_bytes() + (n - major) / 4;
}

DecodedResidual decode_residual(const HeadScan& head, const uint8_t* major, const uint8_t* minor) {
  Bf16 parts[3];
  std::memcpy(parts, major, sizeof parts);
  DecodedResidual out{to_float(parts[0]),
                      {to_float(parts[1]), to_float(parts[2])},
                      std::vector<double>(index(head.columns))};
  for (int64_t j = kScanOutliers; j < head.columns; ++j) {
    const int64_t byte = residual_byte(head, j);
    const uint8_t* const at =
        byte < head.major_bytes() ? major + byte : minor + byte - head.major_bytes();
    out.values[index(j)] = ((*at >> (j % 4 * 2) & 3) - 1.5) * out.step;
  }
  return out;
}

DecodedRow decode(const HeadScan& head, int64_t row) {
  const uint8_t* block = head.blocks + row / 16 * head.stride();
  const int64_t lane = row % 16;
  const uint8_t* footer = block + 512 + head.groups() * 272;
  const auto number = [&](int64_t i) {
    Bf16 x;
    std::memcpy(&x, footer + 32 * i + 2 * lane, sizeof x);
    return static_cast<double>(to_float(x));
  };
  const uint8_t* const rho_b = head.residuals + head.other_at(row);
  const uint8_t* const sigma = rho_b + head.minor_bytes();
  DecodedRow out{std::vector<double>(index(head.columns)),
                 number(2),
                 {number(3), number(4)},
                 decode_residual(head, head.residuals + row * head.major_bytes(), rho_b),
                 decode_residual(head, sigma, sigma + head.major_bytes())};
  for (int64_t j = 0; j < kScanOutliers; ++j) {
    out.w[index(j)] = (block[j / 4 * 64 + 4 * lane + j % 4] - 128.0) * number(0);
  }
  for (int64_t j = kScanOutliers; j < head.columns; ++j) {
    const uint8_t* group = block + 512 + (j / 32 - 1) * 272;
    const int64_t step = j % 32 / 4;
    const int nibble = group[step / 2 * 64 + 4 * lane + j % 4] >> (step % 2 * 4) & 15;
    out.w[index(j)] = (kLevels[nibble] - 127.0) * group[256 + lane] * number(1);
  }
  return out;
}

// A residual takes from the norms what it says, or a little more, and leaves at most `share`; `missed` becomes what it
// leaves.
void check_residual(Check& check,
                    const HeadScan& head,
                    const DecodedResidual& residual,
                    bool lonely,
                    double share,
                    std::vector<double>& missed,
                    double (&errors)[2]) {
  double before[2] = {}, left[2] = {};
  for (int64_t j = kScanOutliers; j < head.columns; ++j) {
    const auto part = part_of(head, j);
    before[part] += missed[index(j)] * missed[index(j)];
    missed[index(j)] -= residual.values[index(j)];
    left[part] += missed[index(j)] * missed[index(j)];
  }
  for (size_t part = 0; part < 2; ++part) {
    const double nearer = residual.nearer[part], still = std::sqrt(left[part]);
    check.that(nearer <= errors[part] - still);
    if (!lonely) {
      // Where there is nothing, squares may have vanished.
      check.near(nearer, errors[part] - still, 0.01 * errors[part] + 1e-16);
      check.that(still <= 0.8 * std::sqrt(before[part]));
    }
    errors[part] -= nearer;
  }
  if (!lonely) {
    check.that(std::sqrt(left[0] + left[1]) <= share * std::sqrt(before[0] + before[1]));
  }
}

// The norms of what the encoder left out are those it wrote down, or a little less.
void check_encoding(const Subject& s, const Table& table) {
  s.report.check(s.name("encode_scan: decoded rows are near, error norms hold"), [&](Check& check) {
    Scan scan;
    encode(s.kernels, table, scan);
    for (int64_t r = 0; r < scan.head.rows; ++r) {
      const auto row = decode(scan.head, r);
      std::vector<double> missed(index(table.columns));
      double outliers = 0, rest[2] = {}, norm = 0, decoded_norm = 0;
      for (int64_t j = 0; j < table.columns; ++j) {
        const double w = r < table.rows
                             ? to_float(table.w[index(r * table.columns + table.order[index(j)])])
                             : 0.0F;
        const double error = missed[index(j)] = w - row.w[index(j)];
        (j < kScanOutliers ? outliers : rest[part_of(scan.head, j)]) += error * error;
        norm += w * w;
        decoded_norm += row.w[index(j)] * row.w[index(j)];
      }
      check.that(row.outlier_error >= std::sqrt(outliers));
      check.near(row.outlier_error, std::sqrt(outliers), 0.01 * std::sqrt(outliers));
      double errors[2] = {row.rest_errors[0], row.rest_errors[1]};
      for (size_t part = 0; part < 2; ++part) {
        const double error = std::sqrt(rest[part]);
        check.that(errors[part] >= error);
        check.near(errors[part], error, 0.01 * error + 1e-16);
      }
      // 2 bits each, and tails: what rho cuts off is large beside the rest.
      check_residual(check, scan.head, row.rho, r == kLonely, 0.6, missed, errors);
      check_residual(check, scan.head, row.sigma, r == kLonely, 0.7, missed, errors);
      check.that(scan.head.largest_norm >= std::sqrt(std::max(norm, decoded_norm)));
      check.that(std::sqrt(outliers + rest[0] + rest[1]) <=
                 0.12 * std::sqrt(norm));  // 4 bits: some 8 %
    }
  });
}

// x as scan takes it.
struct Input {
  std::vector<float> x;
  std::vector<int8_t> high, low;
  std::vector<int16_t> pairs;
  std::vector<int32_t> sums;
  std::vector<float> scales;
  std::vector<int8_t> planes;
  ScanInput in;

  Input(const FusedKernels& kernels, const HeadScan& head, const std::vector<float>& plain)
      : x(plain.size()),
        high(x.size()),
        low(x.size()),
        pairs(x.size()),
        sums(x.size() / 32),
        scales(x.size() / 32),
        planes(index(2 * head.plane_bytes())),
        in{.x = {high.data(), low.data(), pairs.data(), sums.data(), scales.data()},
           .planes = planes.data()} {
    for (size_t j = 0; j < x.size(); ++j) {
      x[j] = plain[index(head.order[j])];
    }
    kernels.quantize(x.data(), head.columns, in.x);
    bound_scan(head, x.data(), in);
  }

  /// Column j of x as `refine` takes it.
  double plane(const HeadScan& head, int64_t j) const {
    const int64_t byte = residual_byte(head, j);
    const int8_t* const at = in.planes + byte / 64 * 256 + j % 4 * 64 + byte % 64;
    return (256.0 * at[0] + at[head.plane_bytes()]) * in.rest_unit;
  }
};

std::vector<std::vector<float>> inputs(Random& random, const Table& table, bool small) {
  std::vector<std::vector<float>> all;
  for (int i = 0; i < (small ? 2 : 12); ++i) {
    all.push_back(random.normals(table.columns, std::exp(random.normal())));
    all.push_back(random.normals(table.columns));
    for (int n = 0; n < 5; ++n) {
      all.back()[index(random.below(table.columns))] *= 300;  // outliers, in any column
    }
    all.push_back(random.normals(table.columns));
    for (int64_t j = 0; j < kScanOutliers; ++j) {
      all.back()[index(table.order[index(j)])] *= 50;  // in the columns that are for them
    }
  }
  // Beside one large number 16 bits miss nearly half a unit of all others, and always upwards.
  all.emplace_back(index(table.columns), 0.49F * 1000 / 32512);
  all.back()[index(table.order[index(table.columns - 1)])] = 1000;
  all.emplace_back(index(table.columns), 0.0F);
  all.push_back(random.normals(table.columns, 1e-20F));
  all.push_back(random.normals(table.columns, 1e15F));
  // Along the error of a row: where the bound is tightest.
  Scan scan;
  encode(fused_kernels(Isa::kGeneric), table, scan);
  for (const int64_t r : {int64_t{1}, int64_t{17}, table.rows - 1}) {
    const auto row = decode(scan.head, r);
    std::vector<float> x(index(table.columns));
    for (int64_t j = 0; j < table.columns; ++j) {
      const auto column = table.order[index(j)];
      x[index(column)] = static_cast<float>(to_float(table.w[index(r * table.columns + column)]) -
                                            row.w[index(j)]);
    }
    all.push_back(std::move(x));
  }
  return all;
}

std::vector<float> all_rows(const FusedKernels& kernels,
                            const Table& table,
                            const std::vector<float>& x) {
  std::vector<float> y(index(table.rows));
  kernels.dot_rows(table.w.data(), nullptr, 0, table.rows, x.data(), table.columns, y.data());
  return y;
}

// The bound of every row, against its definition, and against the full head of every instruction
// set.
void compare_scan(Check& check,
                  const FusedKernels& kernels,
                  const Scan& scan,
                  const Table& table,
                  const std::vector<float>& x) {
  const Input input(kernels, scan.head, x);
  for (int64_t j = kScanOutliers; j < table.columns; ++j) {
    check.near(input.plane(scan.head, j), input.x[index(j)], 0.506 * input.in.rest_unit + 1e-30);
  }
  const int64_t blocks = scan.head.rows / 16;
  std::vector<float> upper(index(scan.head.rows), NAN), block_upper(index(blocks), NAN);
  const int64_t half = blocks / 2;  // in two parts, as threads have it
  kernels.scan(scan.head, {0, half}, input.in, upper.data(), block_upper.data());
  kernels.scan(scan.head, {half, blocks}, input.in, upper.data(), block_upper.data());
  for (int64_t r = 0; r < scan.head.rows; ++r) {
    const auto row = decode(scan.head, r);
    double want = input.in.slack + row.outlier_error * input.in.outlier_norm +
                  row.rest_errors[0] * input.in.major_norm +
                  row.rest_errors[1] * input.in.minor_norm;
    double size = want;
    for (int64_t j = 0; j < table.columns; ++j) {
      const double value = 256.0 * input.high[index(j)] + input.low[index(j)];
      const double product = row.w[index(j)] * value * input.scales[index(j / 32)];
      want += product;
      size += std::fabs(product);
    }
    check.near(upper[index(r)], want, kSum * size);
  }
  // Every third row, backwards, has its bound brought nearer, three times.
  std::vector<int32_t> some;
  std::vector<float> nearer;
  for (int64_t r = table.rows - 1; r >= 0; r -= 3) {
    some.push_back(static_cast<int32_t>(r));
    nearer.push_back(upper[index(r)]);
  }
  std::vector<std::vector<float>> exact;
  for (const auto isa : usable_isas()) {
    exact.push_back(all_rows(fused_kernels(isa), table, x));
    for (int64_t r = 0; r < table.rows; ++r) {
      check.that(upper[index(r)] >= exact.back()[index(r)]);
    }
  }
  for (size_t part = 0; part < kScanParts; ++part) {
    const auto before = nearer;
    const bool finer = part == 2;
    kernels.refine(scan.head,
                   static_cast<ScanPart>(part),
                   some.data(),
                   static_cast<int64_t>(some.size()),
                   input.in,
                   nearer.data());
    for (size_t i = 0; i < some.size(); ++i) {
      const auto row = decode(scan.head, some[i]);
      const auto& residual = finer ? row.sigma : row.rho;
      const double slack = residual.step * input.in.step_slack[part];
      const double less[2] = {residual.nearer[0] * input.in.major_norm,
                              residual.nearer[1] * input.in.minor_norm};
      double want = before[i], sizes = std::fabs(before[i]);
      for (const size_t of : {0, 1}) {
        if (finer || of == part) {
          want -= less[of];
          sizes += std::fabs(less[of]);
        }
      }
      double value = -residual.step * input.in.middle[part], size = 0, missed = 0;
      for (int64_t j = kScanOutliers; j < table.columns; ++j) {
        if (finer || part_of(scan.head, j) == part) {
          const double bits = residual.values[index(j)] + 1.5 * residual.step;
          const double x16 = input.plane(scan.head, j);
          value += bits * x16;
          size += residual.step * std::fabs(input.x[index(j)]);
          missed += bits * (input.x[index(j)] - x16);
        }
      }
      check.that(std::fabs(missed) <= slack);
      sizes += std::fabs(value);
      want += value + slack + sizes * 0x1p-21;
      check.near(nearer[i], want, kSum * (sizes + 5 * size) + 1e-37);
    }
    for (const auto& of_isa : exact) {
      for (size_t i = 0; i < some.size(); ++i) {
        check.that(nearer[i] >= of_isa[index(some[i])]);
      }
    }
  }
  for (int64_t b = 0; b < blocks; ++b) {
    check.same(block_upper[index(b)],
               *std::max_element(&upper[index(16 * b)], &upper[index(16 * b)] + 16));
  }
}

void check_bound(const Subject& s, const Table& table) {
  s.report.check(s.name("scan: upper bounds by definition, none below the full head"),
                 [&](Check& check) {
                   Random random(31);
                   Scan own, plain;
                   encode(s.kernels, table, own);
                   encode(s.generic, table, plain);
                   for (const auto& x : inputs(random, table, s.small)) {
                     compare_scan(check, s.kernels, own, table, x);
                     compare_scan(check, s.kernels, plain, table, x);
                   }
                 });
}

void check_dot_rows(const Subject& s, const Table& table) {
  s.report.check(s.name("dot_rows: the same with ids as without, bit for bit"), [&](Check& check) {
    Random random(32);
    const auto x = random.normals(table.columns);
    const auto y = all_rows(s.kernels, table, x);
    const auto plain = all_rows(s.generic, table, x);
    for (int64_t r = 0; r < table.rows; ++r) {
      double want = 0, size = 0;
      for (int64_t j = 0; j < table.columns; ++j) {
        const double product =
            static_cast<double>(to_float(table.w[index(r * table.columns + j)])) * x[index(j)];
        want += product;
        size += std::fabs(product);
      }
      check.near(y[index(r)], want, kSum * size);
      check.near(y[index(r)], plain[index(r)], kSum * size);
    }
    for (const int64_t count : {1, 2, 3, 30}) {
      std::vector<int32_t> ids(index(count));
      for (auto& id : ids) {
        id = static_cast<int32_t>(random.below(table.rows));
      }
      std::vector<float> some(index(count)), part(index(count));
      s.kernels.dot_rows(
          table.w.data(), ids.data(), 0, count, x.data(), table.columns, some.data());
      for (int64_t i = 0; i < count; ++i) {
        check.same(some[index(i)], y[index(ids[index(i)])]);
      }
      const int64_t first = table.rows - count;
      s.kernels.dot_rows(
          table.w.data(), nullptr, first, count, x.data(), table.columns, part.data());
      check.same(part, std::vector<float>(y.begin() + first, y.end()));
    }
  });
}

// The rows of the blocks found, of bounds of their own.
void check_reach_rows(Check& check,
                      const Subject& s,
                      const std::vector<int32_t>& blocks,
                      float threshold) {
  Random random(34);
  const auto upper = random.normals(16'000);
  std::vector<int32_t> want;
  for (const auto block : blocks) {
    for (int32_t row = 16 * block; row < 16 * block + 16; ++row) {
      if (upper[index(row)] >= threshold) {
        want.push_back(row);
      }
    }
  }
  for (const int64_t most : {int64_t{16'000}, int64_t{3}}) {
    std::vector<int32_t> rows(index(most + 16), -1);
    std::vector<float> bounds(rows.size());
    const int64_t count = s.kernels.reach_rows(upper.data(),
                                               blocks.data(),
                                               static_cast<int64_t>(blocks.size()),
                                               threshold,
                                               most,
                                               rows.data(),
                                               bounds.data());
    const auto all = static_cast<int64_t>(want.size());
    check.that(all <= most ? count == all : count > most && count <= most + 16);
    for (int64_t i = 0; i < std::min(count, most); ++i) {
      check.same(rows[index(i)], want[index(i)]);
      check.same(bounds[index(i)], upper[index(want[index(i)])]);
    }
  }
}

void check_reach(const Subject& s) {
  s.report.check(s.name("reach"), [&](Check& check) {
    Random random(33);
    auto upper = random.normals(1000);
    for (const auto& [begin, end] :
         {std::pair<int64_t, int64_t>{0, 1000}, {3, 997}, {16, 32}, {5, 5}, {990, 1000}}) {
      for (const float threshold : {-10.0F, 0.0F, upper[500], 2.5F, 10.0F, -INFINITY}) {
        std::vector<int32_t> want;
        for (int64_t b = begin; b < end; ++b) {
          if (upper[index(b)] >= threshold) {
            want.push_back(static_cast<int32_t>(b));
          }
        }
        std::vector<int32_t> found(index(end - begin), -1);
        const int64_t count = s.kernels.reach(upper.data(), {begin, end}, threshold, found.data());
        found.resize(index(std::clamp<int64_t>(count, 0, end - begin)));
        check.same(found, want);
        check_reach_rows(check, s, found, threshold);
      }
    }
  });
}

}  // namespace

void check_head(const Subject& s) {
  // Columns of both parts, with and without a last half line; of the first part only.
  for (const auto& table :
       {make_table(s.small ? 100 : 1003, 640), make_table(37, 352), make_table(37, 96)}) {
    check_encoding(s, table);
    check_dot_rows(s, table);
    check_bound(s, table);
  }
  check_reach(s);
}

}  // namespace gemma_torch::kernels::test
