// The CPU's silu_and_mul: 128 values at a time, in float on the stack.
#include <algorithm>
#include <type_traits>

#include "common/parallel.h"
#include "moe/sigmoid.cuh"

namespace forebay {
namespace {

constexpr int64_t kStretch = 128;
constexpr int64_t kBytesEach = 4;  // that could be copied in the time a value takes

// silu(gate) * up of `count` values, at most kStretch. Two loops, because compilers make poor code
// of the two bounds together.
template <class T>
void activate(const T* gate, const T* up, int64_t count, float* out) {
  alignas(64) float line[kStretch];
  for (int64_t i = 0; i < count; ++i) line[i] = at_least(to_float(gate[i]), -kExpRange);
  for (int64_t i = 0; i < count; ++i) out[i] = line[i] * sigmoid_above(line[i]) * to_float(up[i]);
}

template <class T>
void activate_row(const SiluAndMulParams& p, int64_t row) {
  const T* gate = static_cast<const T*>(p.x) + row * p.x_stride;
  T* out = static_cast<T*>(p.out) + row * p.width;
  for (int64_t start = 0; start < p.width; start += kStretch) {
    const int64_t count = std::min(kStretch, p.width - start);
    if constexpr (std::is_same_v<T, float>) {
      activate(gate + start, gate + p.width + start, count, out + start);
    } else {
      alignas(64) float line[kStretch];
      activate(gate + start, gate + p.width + start, count, line);
      for (int64_t i = 0; i < count; ++i) out[start + i] = from_float<T>(line[i]);
    }
  }
}

template <class T>
void quantise_row(const SiluAndMulParams& p, int64_t row) {
  const T* gate = static_cast<const T*>(p.x) + row * p.x_stride;
  const int64_t groups = (p.width + kStretch - 1) / kStretch;
  e4m3* out = static_cast<e4m3*>(p.out) + row * p.width;
  float* scales = static_cast<float*>(p.scales) + row * groups;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t start = group * kStretch, count = std::min(kStretch, p.width - start);
    alignas(64) float line[kStretch];
    // As integers, magnitudes order like the floats they are, with infinities and NaN above.
    uint32_t largest = 0;
    activate(gate + start, gate + p.width + start, count, line);
    for (int64_t i = 0; i < count; ++i)
      largest = std::max(largest, float_bits(line[i]) & 0x7fffffffu);
    const Fp8Scale scale = fp8_scale(float_of(largest));
    for (int64_t i = 0; i < count; ++i) out[start + i] = from_float<e4m3>(line[i] * scale.inverse);
    scales[group] = scale.scale;
  }
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_silu_and_mul(const SiluAndMulParams* params, void*) {
  using namespace forebay;
  const SiluAndMulParams& p = *params;
  if (p.scales != nullptr && p.group != kStretch) return FOREBAY_UNSUPPORTED;
  return with_float_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(p.rows, p.width * kBytesEach, p.num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        p.scales == nullptr ? activate_row<T>(p, row) : quantise_row<T>(p, row);
    });
    return int(FOREBAY_OK);
  });
}
