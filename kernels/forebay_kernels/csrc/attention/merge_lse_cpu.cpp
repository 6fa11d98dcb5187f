// The CPU's merge_lse: a row's parts in order, their weights first.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/dtypes.cuh"
#include "common/parallel.h"

namespace forebay {
namespace {

constexpr int64_t kMaxParts = 64;
constexpr int64_t kMaxWidth = 2048;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

template <class T>
void add_part(const T* __restrict__ values, float weight, float* __restrict__ sums, int64_t width) {
  for (int64_t i = 0; i < width; ++i) sums[i] += weight * to_float(values[i]);
}

template <class T>
void merge_row(const MergeLseParams& p, int64_t row) {
  const float* lses = static_cast<const float*>(p.lses) + row;
  const T* outs = static_cast<const T*>(p.outs) + row * p.width;
  alignas(64) float sums[kMaxWidth];
  std::fill_n(sums, p.width, 0.0f);
  float largest = kNothing;
  for (int64_t s = 0; s < p.parts; ++s) largest = std::fmax(largest, lses[s * p.lses_stride]);
  const float base = largest == kNothing ? 0.0f : largest;
  float total = 0.0f;
  for (int64_t s = 0; s < p.parts; ++s) {
    const float lse = lses[s * p.lses_stride];
    if (lse == kNothing) continue;
    const float weight = std::exp(lse - base);
    total += weight;
    if (weight != 0.0f) add_part(outs + s * p.outs_stride, weight, sums, p.width);
  }
  const float factor = total == 0.0f ? 0.0f : 1.0f / total;
  T* out = static_cast<T*>(p.out) + row * p.width;
  for (int64_t i = 0; i < p.width; ++i) out[i] = from_float<T>(sums[i] * factor);
  static_cast<float*>(p.lse)[row] = total == 0.0f ? kNothing : base + std::log(total);
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_merge_lse(const MergeLseParams* params, void*) {
  using namespace forebay;
  const MergeLseParams& p = *params;
  if (p.width > kMaxWidth || p.parts < 1 || p.parts > kMaxParts) return FOREBAY_UNSUPPORTED;
  return with_float_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(p.rows, p.parts * p.width * int64_t(sizeof(T)), p.num_threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t row = begin; row < end; ++row) merge_row<T>(p, row);
                 });
    return int(FOREBAY_OK);
  });
}
