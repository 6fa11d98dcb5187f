// exp and sigmoid out of operations that round the same way everywhere: a GPU, its host-compiled
// code and the CPU twins give the same bits.
#pragma once
#include "common/dtypes.cuh"

namespace forebay {

// a * b + c rounded once. Processors without the instruction round twice, the first time to a
// double: the result is another one in about 1 of 2^29 cases.
FOREBAY_DEVICE float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || defined(FOREBAY_HOST) || !defined(__x86_64__)
  return __builtin_fmaf(a, b, c);
#else
  return float(double(a) * double(b) + double(c));
#endif
}
FOREBAY_DEVICE float rounded_sum(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
FOREBAY_DEVICE float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
FOREBAY_DEVICE float rounded_quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}
// Of a number in [1, 2^126), rounded to nearest. On a GPU the chip's estimate and one step of
// Newton's: what __frcp_rn does in this range, without its branch for the others.
FOREBAY_DEVICE float reciprocal(float a) {
#if defined(__CUDA_ARCH__)
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(a));
  return __fmaf_rn(estimate, __fmaf_rn(-a, estimate, 1.0f), estimate);
#else
  return 1.0f / a;
#endif
}

constexpr float kExpRange = 87.0f;  // exp and its reciprocal are normal numbers

// |x| <= kExpRange. 2^n by the exponent's bits, 2^f for |f| <= 1/2 by a polynomial (minimax of the
// relative error, 9e-8) that is exactly 1 at 0. Relative error at most 2e-7 + 1.4e-8 |x|.
FOREBAY_DEVICE float exp_in_range(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added loses its fraction
  constexpr float kLog2E = 0x1.715476p+0f;
  const float shifted = fused(x, kLog2E, kRound);
  const float n = rounded_sum(shifted, -kRound);
  const float f = fused(x, kLog2E, -n);
  float power = 0x1.5bba14p-10f;
  power = fused(power, f, 0x1.3cea88p-7f);
  power = fused(power, f, 0x1.c6b752p-5f);
  power = fused(power, f, 0x1.ebf9bcp-3f);
  power = fused(power, f, 0x1.62e42ap-1f);
  power = fused(power, f, 1.0f);
  return float_of(float_bits(power) + (float_bits(shifted) << 23));
}

// NaN stays NaN.
FOREBAY_DEVICE float at_least(float x, float bound) { return bound > x ? bound : x; }
// bound > 0. NaN may become the bound. Elsewhere than on a GPU as integers, which compilers turn
// into one vector instruction; they order positive floats, and put negative ones below.
FOREBAY_DEVICE float at_most(float x, float bound) {
#if defined(__CUDA_ARCH__)
  return fminf(x, bound);
#else
  const int32_t bits = int32_t(float_bits(x)), most = int32_t(float_bits(bound));
  return float_of(uint32_t(bits < most ? bits : most));
#endif
}

// For x <= 0 or NaN; below -kExpRange 0.
FOREBAY_DEVICE float exp_of_negative(float x) {
  const float power = exp_in_range(at_least(x, -kExpRange));
  const float out = x < -kExpRange ? 0.0f : power;
  return x == x ? out : x;
}

// x >= -kExpRange; of a NaN anything.
FOREBAY_DEVICE float sigmoid_above(float x) {
  return reciprocal(rounded_sum(1.0f, exp_in_range(-at_most(x, kExpRange))));
}

// Below -kExpRange what it is there: 2e-38. NaN of NaN.
FOREBAY_DEVICE float sigmoid(float x) {
  const float out = sigmoid_above(at_least(x, -kExpRange));
  return x == x ? out : x;
}

// Below -kExpRange, and of -infinity, what it is there: -1e-36. NaN of NaN.
FOREBAY_DEVICE float silu(float x) {
  const float above = at_least(x, -kExpRange);
  return rounded_product(above, sigmoid_above(above));
}

}  // namespace forebay
