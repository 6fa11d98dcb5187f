// Conversions two at a time, as GPUs have them, with the same bits elsewhere. A NaN is what a GPU
// makes of one: all ones but the sign.
#pragma once
#include "common/dtypes.cuh"

namespace forebay::kv {

// Of what a multiplication gave.
FOREBAY_DEVICE uint32_t product_bits(float product) {
#if defined(__CUDA_ARCH__)
  return float_bits(product);
#else
  return product == product ? float_bits(product) : 0x7fffffffu;
#endif
}

// Two numbers in the order of memory: the first in the low half.
template <class T>
FOREBAY_DEVICE uint32_t pair_of(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  if constexpr (DtypeOf<T>::value == FOREBAY_BF16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    memcpy(&out, &pair, 4);
  } else {
    const __half2 pair = __floats2half2_rn(first, second);
    memcpy(&out, &pair, 4);
  }
  return out;
#else
  const uint32_t low = first == first ? from_float<T>(first).bits : 0x7fff;
  const uint32_t high = second == second ? from_float<T>(second).bits : 0x7fff;
  return high << 16 | low;
#endif
}

template <class T>
FOREBAY_DEVICE float first_of(uint32_t pair) {
  return to_float(T{uint16_t(pair)});
}
template <class T>
FOREBAY_DEVICE float second_of(uint32_t pair) {
  return to_float(T{uint16_t(pair >> 16)});
}

// Finite numbers as codes.
FOREBAY_DEVICE uint32_t codes_of(float first, float second) {
#if defined(__CUDA_ARCH__)
  return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
#else
  return uint32_t(from_float<e4m3>(second).bits) << 8 | from_float<e4m3>(first).bits;
#endif
}

struct Floats {
  float first, second;
};
FOREBAY_DEVICE Floats floats_of(uint32_t codes) {
#if defined(__CUDA_ARCH__)
  const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(codes), __NV_E4M3);
  const float2 floats = __half22float2(__half2(raw));
  return {floats.x, floats.y};
#else
  return {to_float(e4m3{uint8_t(codes)}), to_float(e4m3{uint8_t(codes >> 8)})};
#endif
}

// The larger of each half.
FOREBAY_DEVICE uint32_t larger_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __vmaxu2(a, b);
#else
  const uint32_t low = (a & 0xffff) > (b & 0xffff) ? a & 0xffff : b & 0xffff;
  return (a >> 16 > b >> 16 ? a >> 16 : b >> 16) << 16 | low;
#endif
}

}  // namespace forebay::kv
