// Arithmetic that gives the same bits on every processor: integers, and floats rounded after each
// operation, which no compiler may fuse.
//
// A logit becomes an exponent, (logit - largest) / temperature * log2(e) <= 0, and a weight,
// 2^exponent in units of 2^-42. Weights are integers, so that their sums are exact and no order of
// additions shows in a result. A weight is within 2e-7 of 2^exponent, relatively, and rounded down
// to a unit; below 2^-42 it is 0: such an id is as good as impossible.
#pragma once
#include "common/dtypes.cuh"

namespace forebay {

#if defined(__CUDA_ARCH__)
FOREBAY_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
FOREBAY_DEVICE float subtract(float a, float b) { return __fsub_rn(a, b); }
FOREBAY_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
FOREBAY_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
FOREBAY_DEVICE double add(double a, double b) { return __dadd_rn(a, b); }
FOREBAY_DEVICE double subtract(double a, double b) { return __dsub_rn(a, b); }
FOREBAY_DEVICE double multiply(double a, double b) { return __dmul_rn(a, b); }
FOREBAY_DEVICE double divide(double a, double b) { return __ddiv_rn(a, b); }
FOREBAY_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }
FOREBAY_DEVICE int leading_zeros(uint64_t value) { return __clzll(int64_t(value)); }
#else
FOREBAY_DEVICE float add(float a, float b) { return a + b; }
FOREBAY_DEVICE float subtract(float a, float b) { return a - b; }
FOREBAY_DEVICE float multiply(float a, float b) { return a * b; }
FOREBAY_DEVICE float divide(float a, float b) { return a / b; }
FOREBAY_DEVICE double add(double a, double b) { return a + b; }
FOREBAY_DEVICE double subtract(double a, double b) { return a - b; }
FOREBAY_DEVICE double multiply(double a, double b) { return a * b; }
FOREBAY_DEVICE double divide(double a, double b) { return a / b; }
FOREBAY_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) {
  return uint64_t(static_cast<unsigned __int128>(a) * b >> 64);
}
FOREBAY_DEVICE int leading_zeros(uint64_t value) { return __builtin_clzll(value); }
#endif

constexpr int kUnitBits = 42;
constexpr uint64_t kUnit = uint64_t(1) << kUnitBits;  // the weight of the most probable id
constexpr float kLowestExponent = -42.0f;
constexpr float kLog2e = 0x1.715476p+0f;

FOREBAY_DEVICE float exponent_of(float logit, float largest, float scale) {
  return multiply(subtract(logit, largest), scale);
}

// 0 for an exponent of -42 or less and for a NaN.
FOREBAY_DEVICE uint64_t weight_of(float exponent) {
  constexpr float kNearest = 0x1.8p+23f;  // adding it rounds to the nearest integer
  const float inside = exponent > kLowestExponent ? exponent : kLowestExponent;
  const float rounded = add(inside, kNearest);
  const float fraction = subtract(inside, subtract(rounded, kNearest));
  const uint32_t shift = 0x4b400000u - float_bits(rounded);
  float power = 0x1.5bd97cp-10f;  // 2^fraction for a fraction in [-1/2, 1/2]
  power = add(multiply(power, fraction), 0x1.3ce8b2p-7f);
  power = add(multiply(power, fraction), 0x1.c6b6dap-5f);
  power = add(multiply(power, fraction), 0x1.ebf9c2p-3f);
  power = add(multiply(power, fraction), 0x1.62e42ap-1f);
  power = add(multiply(power, fraction), 1.0f);
  const uint64_t mantissa = uint64_t(uint32_t(int32_t(multiply(power, 0x1p+24f))));
  const uint64_t weight = mantissa << (kUnitBits - 24) >> shift;
  return exponent > kLowestExponent ? weight : 0;
}

// Logits as integers of the same order; -0 is 0. A NaN comes above +inf or below -inf.
FOREBAY_DEVICE uint32_t key_of(float logit) {
  const uint32_t bits = float_bits(logit);
  const uint32_t key = bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
  return bits == 0x80000000u ? 0x80000000u : key;
}
FOREBAY_DEVICE float logit_of(uint32_t key) {
  return float_of(key >> 31 ? key ^ 0x80000000u : ~key);
}
constexpr uint32_t kKeyOfInfinity = 0xff800000u;
constexpr uint32_t kKeyOfMinusInfinity = 0x007fffffu;

// Ids in the order of truncation, the first to stay being the largest: more probable ones, and
// among equal logits lower ids. Never 0.
constexpr int kIdBits = 20;
constexpr int kRankBits = 32 + kIdBits;
constexpr uint32_t kLastId = (1u << kIdBits) - 1;
FOREBAY_DEVICE uint64_t rank_of(uint32_t key, uint32_t id) {
  return uint64_t(key) << kIdBits | (kLastId - id);
}
FOREBAY_DEVICE uint32_t key_of_rank(uint64_t rank) { return uint32_t(rank >> kIdBits); }
FOREBAY_DEVICE uint32_t id_of_rank(uint64_t rank) { return kLastId - (uint32_t(rank) & kLastId); }

// A number of [0, 1] times 2^bits, rounded up.
FOREBAY_DEVICE uint64_t fixed_point(float share, int bits) {
  const float scaled = multiply(share, float_of(uint32_t(127 + bits) << 23));
  const uint64_t below = uint64_t(scaled);
  return below + (float(below) < scaled ? 1 : 0);
}

// ceil(share / 2^30 * total), at least 1; share <= 2^30, total < 2^62.
constexpr int kShareBits = 30;
FOREBAY_DEVICE uint64_t share_of(uint64_t share, uint64_t total) {
  constexpr uint64_t kLow = (uint64_t(1) << kShareBits) - 1;
  const uint64_t out =
      share * (total >> kShareBits) + ((share * (total & kLow) + kLow) >> kShareBits);
  return out > 0 ? out : 1;
}

// The first 64 bits of Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy
// as 1, 2, 3, SC 2011) at the counter (choice, position, 0, 0).
FOREBAY_DEVICE uint64_t random_bits(uint64_t seed, uint32_t choice, uint32_t position) {
  uint32_t c0 = choice, c1 = position, c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t(0xd2511f53u) * c0, third = uint64_t(0xcd9e8d57u) * c2;
    c0 = uint32_t(third >> 32) ^ c1 ^ k0;
    c1 = uint32_t(third);
    c2 = uint32_t(first >> 32) ^ c3 ^ k1;
    c3 = uint32_t(first);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return uint64_t(c0) << 32 | c1;
}

// ln(sum / kUnit), to about 1e-15. ln m = 2 atanh((m - 1) / (m + 1)) for m in [sqrt(1/2), sqrt(2)).
FOREBAY_DEVICE double log_of_sum(uint64_t sum) {
  const int zeros = leading_zeros(sum);
  double mantissa = multiply(double(int64_t(sum << zeros >> 11)), 0x1p-53);
  int exponent = 64 - zeros - kUnitBits;
  if (mantissa < 0x1.6a09e667f3bcdp-1) {
    mantissa = multiply(mantissa, 2.0);
    exponent -= 1;
  }
  const double z = divide(subtract(mantissa, 1.0), add(mantissa, 1.0));
  const double square = multiply(z, z);
  double series = 0.0;
  for (int odd = 19; odd > 0; odd -= 2)
    series = add(multiply(series, square), divide(2.0, double(odd)));
  return add(multiply(double(exponent), 0x1.62e42fefa39efp-1), multiply(z, series));
}

// Of a logit under the softmax of its row, whose largest has the weight kUnit.
FOREBAY_DEVICE float logprob_of(float logit, float largest, uint64_t sum) {
  const double distance = subtract(double(largest), double(logit));
  return float(subtract(0.0, add(distance, log_of_sum(sum))));
}

}  // namespace forebay
