// Partial attentions into one: a thread holds 16 bytes of a row and takes the parts in order, in
// one pass: what is summed so far is scaled down when a larger lse comes.
#include <algorithm>

#include "common/dtypes.cuh"
#include "common/launch.cuh"

namespace forebay {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kMaxParts = 64;
constexpr int kProcessors = 132;
constexpr int kTogether = 4;  // parts whose values are on their way at the same time

// exp(lse - base), and exactly 0 for a part that saw no key.
__device__ __forceinline__ float weight_of(float lse, float base) {
  return lse == -INFINITY ? 0.0f : expf(lse - base);
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) merge_lse_kernel(MergeLseParams p) {
  constexpr int N = 16 / int(sizeof(T));
  using Values = Pack<T, N>;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;
  const float* lses = static_cast<const float*>(p.lses) + row;
  const T* outs = static_cast<const T*>(p.outs) + row * p.width + int(threadIdx.x) * N;
  const int parts = int(p.parts);

  float largest = -INFINITY, total = 0.0f;
  float sums[N] = {};
  for (int first = 0; first < parts; first += kTogether) {
    float part_lses[kTogether];
    Values values[kTogether];
    float larger = largest;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int64_t s = first + i;
      part_lses[i] = s < parts ? lses[s * p.lses_stride] : -INFINITY;
      if (s < parts) values[i] = *reinterpret_cast<const Values*>(outs + s * p.outs_stride);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) larger = fmaxf(larger, part_lses[i]);
    const float base = larger == -INFINITY ? 0.0f : larger;
    const float rescale = weight_of(largest, base);
    largest = larger;
    total *= rescale;
#pragma unroll
    for (int j = 0; j < N; ++j) sums[j] *= rescale;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const float weight = weight_of(part_lses[i], base);
      total += weight;
      if (weight == 0.0f) continue;
#pragma unroll
      for (int j = 0; j < N; ++j) sums[j] += weight * to_float(values[i].values[j]);
    }
  }
  const float factor = total == 0.0f ? 0.0f : 1.0f / total;
  Values out;
#pragma unroll
  for (int j = 0; j < N; ++j) out.values[j] = from_float<T>(sums[j] * factor);
  T* target = static_cast<T*>(p.out) + row * p.width + int(threadIdx.x) * N;
  *reinterpret_cast<Values*>(target) = out;
  if (threadIdx.x == 0)
    static_cast<float*>(p.lse)[row] = total == 0.0f ? -INFINITY : largest + logf(total);
}

template <class T>
int start(const MergeLseParams& p, void* stream) {
  constexpr int N = 16 / int(sizeof(T));
  if (p.width % N != 0 || p.width > kMaxThreads * N || p.outs_stride % N != 0)
    return FOREBAY_UNSUPPORTED;
  const int packs = int(p.width) / N;
  const int64_t rows_each = std::clamp<int64_t>(p.rows / kProcessors, 1, kMaxThreads / packs);
  const int64_t blocks = (p.rows + rows_each - 1) / rows_each;
  if (blocks > 0x7fffffff) return FOREBAY_UNSUPPORTED;
  return launch(&merge_lse_kernel<T>, dim3(unsigned(blocks)),
                dim3(unsigned(packs), unsigned(rows_each)), 0, stream, p);
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_merge_lse(const MergeLseParams* params, void* stream) {
  using namespace forebay;
  const MergeLseParams& p = *params;
  if (p.rows == 0) return FOREBAY_OK;
  if (p.width == 0 || p.parts < 1 || p.parts > kMaxParts) return FOREBAY_UNSUPPORTED;
  return with_float_dtype(p.dtype, [&](auto type) { return start<decltype(type)>(p, stream); });
}
