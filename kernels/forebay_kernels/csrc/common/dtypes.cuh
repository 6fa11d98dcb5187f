// Numbers of 8 and 16 bits, and how they are read, rounded and written: to nearest, ties to even.
//
// On a GPU the conversions are the chip's own; elsewhere they are integer code with the same
// results, so that host-compiled kernels and CPU twins give the bits that a GPU gives. What a NaN
// is rounded to is the chip's one NaN: all bits but the sign.
#pragma once
#include <cstdint>
#include <cstring>

#include "params.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#define FOREBAY_DEVICE __host__ __device__ __forceinline__
#elif defined(FOREBAY_HOST)
#include "host/shim.h"
#define FOREBAY_DEVICE inline __attribute__((always_inline))
#else
#define FOREBAY_DEVICE inline __attribute__((always_inline))
#endif

namespace forebay {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct e4m3 {
  uint8_t bits;
};

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr int32_t value = FOREBAY_F32;
};
template <>
struct DtypeOf<bf16> {
  static constexpr int32_t value = FOREBAY_BF16;
};
template <>
struct DtypeOf<f16> {
  static constexpr int32_t value = FOREBAY_F16;
};
template <>
struct DtypeOf<e4m3> {
  static constexpr int32_t value = FOREBAY_E4M3;
};

FOREBAY_DEVICE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
FOREBAY_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

FOREBAY_DEVICE float to_float(float value) { return value; }
FOREBAY_DEVICE float to_float(bf16 value) { return float_of(uint32_t(value.bits) << 16); }

FOREBAY_DEVICE float to_float(f16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  // Exponent and mantissa in a float's places, scaled by 2^112; what overflowed is inf or NaN.
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t rest = uint32_t(value.bits & 0x7fff) << 13;
  const float scaled = float_of(rest) * float_of(0x77800000);
  const uint32_t special = rest >= 0x0f800000 ? 0x7f800000u : 0u;
  return float_of(float_bits(scaled) | special | sign);
#endif
}

// Sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity; 0x7f and 0xff are NaN.
FOREBAY_DEVICE float to_float(e4m3 value) {
  const uint32_t sign = uint32_t(value.bits & 0x80) << 24;
  const uint32_t rest = uint32_t(value.bits & 0x7f) << 20;
  const float scaled = float_of(rest) * float_of(0x7b800000);  // 2^120
  const uint32_t special = rest == 0x07f00000 ? 0x7fc00000u : 0u;
  return float_of(float_bits(scaled) | special | sign);
}

template <class T>
FOREBAY_DEVICE T from_float(float value);

template <>
FOREBAY_DEVICE float from_float<float>(float value) {
  return value;
}

template <>
FOREBAY_DEVICE bf16 from_float<bf16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded)};
#endif
}

template <>
FOREBAY_DEVICE f16 from_float<f16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = float_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  // Subnormal: the addition's own rounding puts the result in the low bits.
  const uint32_t small = float_bits(float_of(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  uint32_t out = magnitude < 0x38800000 ? small : normal;
  out = magnitude >= 0x47800000 ? 0x7c00 : out;
  return {uint16_t(magnitude > 0x7f800000 ? 0x7fff : sign | out)};
#endif
}

// Beyond 448 the largest finite number, NaN stays NaN.
template <>
FOREBAY_DEVICE e4m3 from_float<e4m3>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return {uint8_t(__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3))};
#else
  const uint32_t bits = float_bits(value);
  const uint32_t sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  const uint32_t small = float_bits(float_of(magnitude) + 16384.0f) - 0x46800000;
  const uint32_t normal = (magnitude - 0x3c000000 + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  uint32_t out = magnitude < 0x3c800000 ? small : normal;
  out = magnitude >= 0x43e00000 ? 0x7e : out;
  return {uint8_t(magnitude > 0x7f800000 ? 0x7f : sign | out)};
#endif
}

// N values that are read and written in one access.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

// visit(T{}) for the type T of `dtype`; FOREBAY_UNSUPPORTED for others.
template <class Visitor>
int with_float_dtype(int32_t dtype, Visitor visit) {
  switch (dtype) {
    case FOREBAY_F32:
      return visit(float{});
    case FOREBAY_BF16:
      return visit(bf16{});
    case FOREBAY_F16:
      return visit(f16{});
    default:
      return FOREBAY_UNSUPPORTED;
  }
}

// The scale of an fp8 group and what values are multiplied by, from the group's largest magnitude:
// 448 (the largest e4m3) stands for it. A group smaller than 2^-110 counts as that; one with an
// infinity or a NaN gets a scale of NaN, so that what is read back shows it.
struct Fp8Scale {
  float scale, inverse;
};
FOREBAY_DEVICE Fp8Scale fp8_scale(float largest_magnitude) {
  if (!(largest_magnitude < float_of(0x7f800000))) return {float_of(0x7fc00000), 0.0f};
  const float floor = float_of((127u - 110u) << 23);
  const float largest = largest_magnitude > floor ? largest_magnitude : floor;
#if defined(__CUDA_ARCH__)
  return {__fdiv_rn(largest, 448.0f), __fdiv_rn(448.0f, largest)};
#else
  return {largest / 448.0f, 448.0f / largest};
#endif
}

}  // namespace forebay
