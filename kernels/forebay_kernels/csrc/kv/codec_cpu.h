// Rows of numbers as e4m3 codes with a scale per group, and back.
#pragma once
#include <algorithm>

#include "kv/layout.h"

namespace forebay::kv {

// A group with an infinity or a NaN has a scale of NaN, and codes of 0.
template <class T>
float encode_group(const T* values, int64_t count, uint8_t* codes) {
  float line[kGroup];
  // As integers, magnitudes order like the floats they are, with infinities and NaN above.
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    line[i] = to_float(values[i]);
    largest = std::max(largest, float_bits(line[i]) & 0x7fffffffu);
  }
  const Fp8Scale scale = fp8_scale(float_of(largest));
  const uint8_t kept = scale.inverse > 0.0f ? 0xff : 0;
  for (int64_t i = 0; i < count; ++i)
    codes[i] = from_float<e4m3>(line[i] * scale.inverse).bits & kept;
  return scale.scale;
}

// All NaN are written as one, whatever a processor makes of a product with NaN.
template <class T>
void decode_group(const uint8_t* codes, int64_t count, float scale, T* values) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = to_float(e4m3{codes[i]}) * scale;
    values[i] = from_float<T>(value == value ? value : float_of(0x7fc00000));
  }
}

}  // namespace forebay::kv
