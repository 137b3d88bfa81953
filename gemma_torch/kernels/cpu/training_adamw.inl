// OptimizerTraining of training_kernels.h. Part of training_kernels.inl.

// A hash of 32 bits of each number: two rounds of xor-shift and multiply (constants: Wellons' lowbias32).
GEMMA_TORCH_INLINE U hash_of(U x) {
  x = (x ^ (x >> 16)) * 0x7feb352dU;
  x = (x ^ (x >> 15)) * 0x846ca68bU;
  return x ^ (x >> 16);
}

GEMMA_TORCH_INLINE U counted_from(uint32_t first) {
  constexpr uint32_t kCount[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_as<U>(kCount) + first;
}

// x, rounded up to a bfloat16 where the 16 bits that it loses and those of `chance` together carry, else down.
GEMMA_TORCH_INLINE F rounded_by(const U& chance, const F& x) {
  return as_float((as_bits(x) + chance) & 0xffff0000U);
}

template <typename G>
void rounded_adamw(const RoundedAdamW<G>& of, int64_t first, int64_t n, const AdamWFactors& by) {
  const auto seed = by.seed + static_cast<uint32_t>(first);
  by_lanes(n, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    const F slope = get(of.gradient + j, count) * by.gradient;
    const F mean = get(of.exp_avg + j, count) * by.beta1 + slope * (1.0F - by.beta1);
    const F square = get(of.exp_avg_sq + j, count) * by.beta2 + slope * slope * (1.0F - by.beta2);
    const F step = mean * by.rate / (sqrt(square) * by.root + by.eps);
    const F x = get(of.parameter + j, count) * by.keep - step;
    const U chance = hash_of(counted_from(seed + static_cast<uint32_t>(j)));
    put(of.parameter + j, rounded_by(chance >> 16, x), count);
    // Moments share theirs: they are never compared.
    put(of.exp_avg + j, rounded_by(chance & 0xffffU, mean), count);
    put(of.exp_avg_sq + j, rounded_by(chance & 0xffffU, square), count);
  });
}
