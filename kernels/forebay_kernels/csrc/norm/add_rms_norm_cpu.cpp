// The CPU's add_rms_norm: two passes over a row that stays in the first-level cache.
#include <algorithm>
#include <cmath>

#include "common/dtypes.cuh"
#include "common/parallel.h"

namespace forebay {
namespace {

template <class T>
void norm_row(const AddRmsNormParams& p, int64_t row, float* line) {
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* residual = static_cast<const T*>(p.residual);
  const T* weight = static_cast<const T*>(p.weight);
  T* total = static_cast<T*>(p.total);
  const int64_t width = p.width;
  if (residual != nullptr) {
    residual += row * p.residual_stride;
    for (int64_t i = 0; i < width; ++i)
      line[i] = to_float(from_float<T>(to_float(x[i]) + to_float(residual[i])));
  } else {
    for (int64_t i = 0; i < width; ++i) line[i] = to_float(x[i]);
  }
  if (total != nullptr)
    for (int64_t i = 0; i < width; ++i) total[row * width + i] = from_float<T>(line[i]);
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) squares += line[i] * line[i];
  const float factor = 1.0f / std::sqrt(squares / float(width) + p.eps);
  for (int64_t i = 0; i < width; ++i) line[i] = line[i] * factor * to_float(weight[i]);
  if (p.scales == nullptr) {
    T* out = static_cast<T*>(p.out) + row * width;
    for (int64_t i = 0; i < width; ++i) out[i] = from_float<T>(line[i]);
    return;
  }
  const int64_t groups = (width + p.group - 1) / p.group;
  e4m3* out = static_cast<e4m3*>(p.out) + row * width;
  float* scales = static_cast<float*>(p.scales) + row * groups;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t start = group * p.group, end = std::min(width, start + p.group);
    // As integers, magnitudes order like the floats they are, with infinities and NaN above.
    uint32_t largest = 0;
    for (int64_t i = start; i < end; ++i)
      largest = std::max(largest, float_bits(line[i]) & 0x7fffffffu);
    const Fp8Scale scale = fp8_scale(float_of(largest));
    for (int64_t i = start; i < end; ++i) out[i] = from_float<e4m3>(line[i] * scale.inverse);
    scales[group] = scale.scale;
  }
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_add_rms_norm(const AddRmsNormParams* params, void*) {
  using namespace forebay;
  const AddRmsNormParams& p = *params;
  if (p.width > kMaxLine) return FOREBAY_UNSUPPORTED;
  return with_float_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(p.rows, p.width * int64_t(sizeof(T)), p.num_threads,
                 [&](int64_t begin, int64_t end) {
                   alignas(64) float line[kMaxLine];
                   for (int64_t row = begin; row < end; ++row) norm_row<T>(p, row, line);
                 });
    return int(FOREBAY_OK);
  });
}
