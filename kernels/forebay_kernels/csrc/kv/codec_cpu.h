// Rows of numbers as e4m3 codes with a scale per group, and back.
#pragma once
#include <algorithm>
#include <type_traits>

#include "kv/layout.h"

namespace forebay::kv {

// work(count) with the sizes that groups have as constants, so that loops become straight lines.
template <class Work>
FOREBAY_DEVICE void with_group_size(int64_t count, Work work) {
  if (count == kGroup)
    work(std::integral_constant<int64_t, kGroup>());
  else if (count == kGroup / 2)
    work(std::integral_constant<int64_t, kGroup / 2>());
  else
    work(count);
}

// The largest magnitude. As integers, magnitudes order like the floats they are, with infinities
// and NaN above.
template <class T>
float largest_of(const T* values, int64_t size) {
  uint32_t largest = 0;
  with_group_size(size, [&](auto count) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; ++i)
      largest = std::max(largest, float_bits(to_float(values[i])) & 0x7fffffffu);
  });
  return float_of(largest);
}

// A group with an infinity or a NaN, whose scale is NaN, has codes of 0.
template <class T>
void encode_group(const T* values, int64_t size, float inverse, uint8_t* codes) {
  const uint8_t kept = inverse > 0.0f ? 0xff : 0;
  with_group_size(size, [&](auto count) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; ++i)
      codes[i] = from_float<e4m3>(to_float(values[i]) * inverse).bits & kept;
  });
}

// A NaN is written as a GPU makes them: all ones but the sign.
template <class T>
void decode_group(const uint8_t* codes, int64_t size, float scale, T* values) {
  with_group_size(size, [&](auto count) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = to_float(e4m3{codes[i]}) * scale;
      if constexpr (sizeof(T) == 4)
        values[i] = value == value ? value : float_of(0x7fffffff);
      else
        values[i] = {uint16_t(value == value ? from_float<T>(value).bits : 0x7fff)};
    }
  });
}

}  // namespace forebay::kv
