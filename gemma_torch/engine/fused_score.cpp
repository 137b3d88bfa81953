// Logarithms of probabilities of given tokens, without a logit kept: products of 32 rows of the head with 32 tokens.

#include <ATen/ops/empty.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "gemma_torch/engine/fused_chunk.h"

namespace gemma_torch {
namespace {

using kernels::Bf16;

// The parts of a float32 as three bfloat16 numbers whose sum it is. Products of bfloat16 are exact in float32, so three
// of them are a float32 product, at the speed of tiles.
void split(const float* x, int64_t n, Bf16* parts[3]) {
  for (int64_t j = 0; j < n; ++j) {
    float rest = x[j];
    for (int p = 0; p < 3; ++p) {
      parts[p][j] = kernels::to_bf16(rest);
      rest -= kernels::to_float(parts[p][j]);
    }
  }
}

// What some rows of the head add to one token's sum of e^logit.
struct Sum {
  float largest = -std::numeric_limits<float>::infinity();
  double total = 0;

  void add(const float* logits, int64_t n) {
    float most = largest;
    for (int64_t j = 0; j < n; ++j) {
      most = std::max(most, logits[j]);
    }
    if (most > largest) {
      total *= std::exp(static_cast<double>(largest) - most);
      largest = most;
    }
    float sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      sum += std::exp(logits[j] - most);
    }
    total += sum;
  }
};

}  // namespace

at::Tensor FusedEngine::log_prob(const at::Tensor& targets) {
  check_targets(targets, hidden_tokens_);
  const auto wanted = targets.to(at::kCPU, at::kLong).contiguous();
  auto result = at::empty(targets.sizes(), at::kFloat);
  const auto E = model_->cfg.emb_dim, V = vocab_size(), tokens = batch() * hidden_tokens_;
  constexpr int64_t kAtOnce = 512;  // tokens that pass while 32 rows of the head are in cache
  // Threads take what is left, so a sum kept by thread would depend on who was faster: each 512 rows have their own.
  constexpr int64_t kPairs = 16;
  std::vector<float> x(static_cast<size_t>(kAtOnce * E));
  std::vector<Bf16> parts(bf16_products_ ? 3 * x.size() : 0);
  const auto pairs = (V + kTile - 1) / kTile, groups = (pairs + kPairs - 1) / kPairs;
  std::vector<std::vector<Sum>> sums(static_cast<size_t>(groups));
  std::vector<float> chosen(kAtOnce);
  for (int64_t start = 0; start < tokens; start += kAtOnce) {
    const auto count = std::min(kAtOnce, tokens - start);
    for (int64_t n = 0; n < count; ++n) {
      normalize(start + n, x.data() + n * E);
    }
    if (bf16_products_) {
      Bf16* out[3] = {parts.data(), parts.data() + kAtOnce * E, parts.data() + 2 * kAtOnce * E};
      split(x.data(), count * E, out);
    }
    const auto* target = wanted.const_data_ptr<int64_t>() + start;
    team_.run([&](int) {
      std::vector<float> c(kTile * kTile), wide(bf16_products_ ? 0 : static_cast<size_t>(32 * E));
      std::vector<Bf16> narrow(bf16_products_ ? static_cast<size_t>(32 * E) : 0);
      const auto add_pair = [&](int64_t pair, std::vector<Sum>& own) {
        const auto rows = std::min(kTile, V - pair * kTile);
        const auto* table = pack_->head() + pair * kTile * E;
        const auto first = std::min<int64_t>(rows, 16), second = rows - first;
        if (bf16_products_) {
          kernel_.panels_bf16_bf16.key(table, E, first, E, narrow.data());
          kernel_.panels_bf16_bf16.key(table + 16 * E, E, second, E, narrow.data() + 16 * E);
        } else {
          kernel_.panels_f32_bf16.key(table, E, first, E, wide.data());
          kernel_.panels_f32_bf16.key(table + 16 * E, E, second, E, wide.data() + 16 * E);
        }
        for (int64_t n = 0; n < count; n += kTile) {
          if (bf16_products_) {
            const Bf16* const panels[2] = {narrow.data(), narrow.data() + 16 * E};
            for (int64_t p = 0; p < 3; ++p) {
              kernel_.gemm.bf16(
                  parts.data() + p * kAtOnce * E + n * E, E, panels, E, c.data(), kTile, p > 0);
            }
          } else {
            const float* const panels[2] = {wide.data(), wide.data() + 16 * E};
            kernel_.gemm.f32(x.data() + n * E, E, panels, E, c.data(), kTile, false);
          }
          for (int64_t r = 0; r < std::min(kTile, count - n); ++r) {
            own[static_cast<size_t>(n + r)].add(c.data() + r * kTile, rows);
            const auto id = target[n + r] - pair * kTile;
            if (id >= 0 && id < rows) {
              chosen[static_cast<size_t>(n + r)] = c[static_cast<size_t>(r * kTile + id)];
            }
          }
        }
      };
      kernel_.gemm.begin();
      for (auto group = team_.claim(); group < groups; group = team_.claim()) {
        auto& own = sums[static_cast<size_t>(group)];
        own.assign(static_cast<size_t>(count), {});
        for (auto pair = group * kPairs; pair < std::min(pairs, (group + 1) * kPairs); ++pair) {
          add_pair(pair, own);
        }
      }
      kernel_.gemm.end();
    });
    for (int64_t n = 0; n < count; ++n) {
      double largest = -std::numeric_limits<double>::infinity(), total = 0;
      for (const auto& own : sums) {
        largest = std::max(largest, static_cast<double>(own[static_cast<size_t>(n)].largest));
      }
      for (const auto& own : sums) {
        const auto& sum = own[static_cast<size_t>(n)];
        total += sum.total > 0 ? sum.total * std::exp(sum.largest - largest) : 0.0;
      }
      result.mutable_data_ptr<float>()[start + n] =
          static_cast<float>(chosen[static_cast<size_t>(n)] - (largest + std::log(total)));
    }
  }
  return result;
}

}  // namespace gemma_torch
