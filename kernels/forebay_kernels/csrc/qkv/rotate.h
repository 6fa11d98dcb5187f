// A CPU twin's heads: normed, rotated and written in the order of operations that a GPU has.
#pragma once
#include <cmath>

#include "common/parallel.h"
#include "qkv/cache.cuh"

namespace forebay {

constexpr int64_t kMaxWidth = 1024;  // of a head or a latent

// Cache values are multiplied by `inverse` where Out is e4m3.
template <class Out>
FOREBAY_DEVICE Out written_as(float value, float inverse) {
  if constexpr (sizeof(Out) == 1) return from_float<Out>(value * inverse);
  return from_float<Out>(value);
}

template <class In, class Out>
void copy_values(const In* __restrict__ in, Out* __restrict__ out, int64_t count, float inverse) {
  for (int64_t i = 0; i < count; ++i) out[i] = written_as<Out>(to_float(in[i]), inverse);
}

struct Rotation {
  int64_t rotated;
  bool interleaved;
};

// cos, sin: the token's rows.
template <class In, class Out>
void rotate_head(const In* __restrict__ in, Out* __restrict__ out, const float* __restrict__ cos,
                 const float* __restrict__ sin, int64_t width, Rotation rotation, float inverse) {
  const int64_t half = rotation.rotated / 2;
  if (rotation.interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = to_float(in[2 * i]), b = to_float(in[2 * i + 1]);
      out[2 * i] = written_as<Out>(a * cos[i] - b * sin[i], inverse);
      out[2 * i + 1] = written_as<Out>(b * cos[i] + a * sin[i], inverse);
    }
  } else {
    for (int64_t i = 0; i < half; ++i) {
      const float a = to_float(in[i]), b = to_float(in[half + i]);
      out[i] = written_as<Out>(a * cos[i] - b * sin[i], inverse);
      out[half + i] = written_as<Out>(b * cos[i] + a * sin[i], inverse);
    }
  }
  copy_values(in + 2 * half, out + 2 * half, width - 2 * half, inverse);
}

template <class T>
void norm_head(const T* __restrict__ in, const T* __restrict__ weight, float* __restrict__ out,
               int64_t width, float eps) {
  float squares = 0.0f;
  for (int64_t i = 0; i < width; ++i) out[i] = to_float(in[i]);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) squares += out[i] * out[i];
  const float factor = 1.0f / std::sqrt(squares / float(width) + eps);
  for (int64_t i = 0; i < width; ++i) out[i] *= factor * to_float(weight[i]);
}

}  // namespace forebay
