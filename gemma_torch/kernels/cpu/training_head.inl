// The kernels of HeadTraining, included by training_kernels.inl inside its namespaces.

// Numbers e^(logit - largest) of a row: their sum, and how much of it lies in each half of a power of two, which is
// guessed from a sixteenth of them.
struct RowSums {
  static constexpr int kBins = 256, kShift = 22, kSample = 16;
  float top;
  double total;
  float bins[kBins];

  static float lower_end(int bin) { return std::bit_cast<float>(static_cast<uint32_t>(bin) << kShift); }
  void count(const F& e) {
    float all[kLanes];
    store(all, e);
    for (const float x : all) {
      bins[std::min(std::bit_cast<uint32_t>(x) >> kShift, uint32_t{kBins - 1})] += x;
    }
  }
};

RowSums row_sums(const Bf16* logits, int64_t n) {
  RowSums sums{.top = largest_of(logits, n), .total = 0, .bins = {}};
  sums.total = sum_of_exp(logits, n, sums.top, [&](int64_t j, const F& e) __attribute__((always_inline)) {
    if (j % (RowSums::kSample * kLanes) == 0) {
      sums.count(e);
    }
  });
  return sums;
}

// What numbers have to reach so that those below it are about three quarters of what may be left out.
float likely_limit(const RowSums& sums) {
  double below = 0;
  int bin = 0;
  for (; bin < RowSums::kBins; ++bin) {
    below += sums.bins[bin] * RowSums::kSample;
    if (!(below <= 0.75 * kLeftOut * sums.total)) {
      break;
    }
  }
  return std::min(RowSums::lower_end(bin), 1.0F);
}

// Appends to `kept` those of sixteen numbers from token `first` on that are at least `limit`.
// Writes all sixteen places.
GEMMA_TORCH_INLINE void append(const F& e, float limit, int64_t first, KeptTokens& kept) {
  int32_t* tokens = kept.tokens + kept.count;
  float* slopes = kept.slopes + kept.count;
#if defined(__AVX512F__)
  const auto x = std::bit_cast<__m512>(e);
  const __mmask16 at_least = _mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_GE_OQ);
  const auto places = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                       _mm512_set1_epi32(static_cast<int32_t>(first)));
  _mm512_storeu_si512(tokens, _mm512_maskz_compress_epi32(at_least, places));
  _mm512_storeu_ps(slopes, _mm512_maskz_compress_ps(at_least, x));
  kept.count += __builtin_popcount(at_least);
#else
  float all[kLanes];
  store(all, e);
  int count = 0;
  for (int i = 0; i < kLanes; ++i) {
    tokens[count] = static_cast<int32_t>(first) + i;
    slopes[count] = all[i];
    count += all[i] >= limit ? 1 : 0;
  }
  kept.count += count;
#endif
}

// Puts the gradient at the target itself, which is rounded once, as one number.
void set_slope(KeptTokens& kept, int64_t target, float slope) {
  const auto token = static_cast<int32_t>(target);
  const auto at = std::lower_bound(kept.tokens, kept.tokens + kept.count, token) - kept.tokens;
  if (at == kept.count || kept.tokens[at] != token) {
    std::copy_backward(kept.tokens + at, kept.tokens + kept.count, kept.tokens + kept.count + 1);
    std::copy_backward(kept.slopes + at, kept.slopes + kept.count, kept.slopes + kept.count + 1);
    kept.tokens[at] = token;
    ++kept.count;
  }
  kept.slopes[at] = slope;
}

double keep_tokens(const Bf16* logits, int64_t n, int64_t target, float factor, KeptTokens& kept) {
  const RowSums sums = row_sums(logits, n);
  const double loss = std::log(sums.total) + sums.top - widen(logits[target]);
  for (float limit = likely_limit(sums);; limit *= 0.5F) {
    const F top = splat(sums.top);
    F left_out{};
    kept.count = 0;
    by_lanes(n, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      const F e = exp(get(logits + j, count, kLowest) - top);
      left_out += select(splat(limit) > e, e, F{});
      append(e, limit, j, kept);
    });
    if (!(sum(left_out) > kLeftOut * sums.total)) {
      break;
    }
  }
  const auto share = static_cast<float>(factor / sums.total);
  for (int64_t i = 0; i < kept.count; ++i) {
    kept.slopes[i] *= share;
  }
  set_slope(kept, target, static_cast<float>((std::exp(-loss) - 1.0) * factor));
  return loss;
}

// y += the sum of slopes[i] * weight[tokens[i]] over kBlocks times 32 columns. Of 32 numbers of y the even ones lie
// before the odd ones: so a register of bfloat16 becomes two of float32 by a shift and a mask.
template <int kBlocks>
GEMMA_TORCH_INLINE void add_rows(const KeptTokens& kept, const Bf16* weight, int64_t columns, float* y) {
  F even[kBlocks], odd[kBlocks];
  unrolled<kBlocks>([&](auto b) __attribute__((always_inline)) {
    even[b] = load(y + 32 * b);
    odd[b] = load(y + 32 * b + kLanes);
  });
  for (int64_t i = 0; i < kept.count; ++i) {
    const Bf16* row = weight + kept.tokens[i] * columns;
    const F slope = splat(kept.slopes[i]);
    unrolled<kBlocks>([&](auto b) __attribute__((always_inline)) {
      const U pairs = load_as<U>(row + 32 * b);
      even[b] = fma(as_float(pairs << 16), slope, even[b]);
      odd[b] = fma(as_float(pairs & 0xffff0000U), slope, odd[b]);
    });
  }
  unrolled<kBlocks>([&](auto b) __attribute__((always_inline)) {
    store(y + 32 * b, even[b]);
    store(y + 32 * b + kLanes, odd[b]);
  });
}

void add_all_columns(const KeptTokens& kept, const Bf16* weight, int64_t columns, float* y) {
  constexpr int kBlocks = kParts == 1 ? 10 : kParts == 2 ? 2 : 1;  // as many as registers hold
  int64_t j = 0;
  for (; j + 32 * kBlocks <= columns; j += 32 * kBlocks) {
    add_rows<kBlocks>(kept, weight + j, columns, y + j);
  }
  for (; j + 32 <= columns; j += 32) {
    add_rows<1>(kept, weight + j, columns, y + j);
  }
  for (; j < columns; ++j) {
    for (int64_t i = 0; i < kept.count; ++i) {
      y[j] += kept.slopes[i] * widen(weight[kept.tokens[i] * columns + j]);
    }
  }
}

void round_row(const float* y, int64_t columns, Bf16* out) {
  int64_t j = 0;
  for (; j + 32 <= columns; j += 32) {
    const U even = rounded_bits(as_bits(load(y + j))) >> 16;
    const U odd = rounded_bits(as_bits(load(y + j + kLanes))) & 0xffff0000U;
    store_as(out + j, even | odd);
  }
  for (; j < columns; ++j) {
    out[j] = narrow_one<Bf16>(y[j]);
  }
}

void kept_product(KeptTokens* kept, int64_t rows, const HeadTraining::Product& of) {
  constexpr int64_t kTokens = 256;  // whose rows of the weight stay in the cache while all rows use them
  std::fill(of.room, of.room + rows * of.columns, 0.0F);
  for (int64_t end = kTokens; end < of.n + kTokens; end += kTokens) {
    const int64_t later = std::min(kTokens, of.n - end);  // rows of the weight that come next
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t token = end + later * r / rows; token < end + later * (r + 1) / rows; ++token) {
        for (int64_t j = 0; j < of.columns; j += 32) {
          prefetch_later(of.weight + token * of.columns + j);
        }
      }
      KeptTokens& row = kept[r];
      KeptTokens some = row;
      for (some.count = 0; some.count < row.count && row.tokens[some.count] < end;) {
        ++some.count;
      }
      if (some.count > 0) {
        add_all_columns(some, of.weight, of.columns, of.room + r * of.columns);
        row.tokens += some.count;
        row.slopes += some.count;
        row.count -= some.count;
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    round_row(of.room + r * of.columns, of.columns, of.out + r * of.columns);
  }
}
