// Each token's experts' outputs, weighted and added in the order in which they were chosen.
#include "moe/sigmoid.cuh"
#include "moe/tiling.cuh"

namespace forebay {
namespace {

constexpr int kAtOnce = 4;  // experts whose rows are being read

template <class T>
__global__ void __launch_bounds__(kTileThreads)
    moe_unpermute_kernel(MoeUnpermuteParams p, Tiling tiling) {
  constexpr int N = 16 / sizeof(T);
  using Values = Pack<T, N>;
  const Place place(tiling, 1);
  const int64_t packs = p.width / N;
  if (place.row >= p.tokens || place.pack >= packs) return;
  const int32_t* rows = static_cast<const int32_t*>(p.inverse) + place.row * p.top_k;
  const float* weights = static_cast<const float*>(p.weights) + place.row * p.top_k;

  float sums[N] = {};
  if (p.shared != nullptr) {
    const T* shared = static_cast<const T*>(p.shared) + place.row * p.shared_stride;
    const Values own = reinterpret_cast<const Values*>(shared)[place.pack];
#pragma unroll
    for (int j = 0; j < N; ++j) sums[j] = to_float(own.values[j]);
  }
  for (int k = 0; k < p.top_k; k += kAtOnce) {
    int32_t slots[kAtOnce];
    float factors[kAtOnce];
    bool present[kAtOnce];
    Values values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int inside = k + i < p.top_k ? k + i : p.top_k - 1;
      slots[i] = rows[inside];
      factors[i] = weights[inside];
      present[i] = k + i < p.top_k && slots[i] >= 0 && slots[i] < p.slots;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (!present[i]) continue;
      const T* y = static_cast<const T*>(p.y) + slots[i] * p.y_stride;
      values[i] = reinterpret_cast<const Values*>(y)[place.pack];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (!present[i]) continue;
#pragma unroll
      for (int j = 0; j < N; ++j)
        sums[j] = rounded_sum(sums[j], rounded_product(factors[i], to_float(values[i].values[j])));
    }
  }
  Values out;
#pragma unroll
  for (int j = 0; j < N; ++j) out.values[j] = from_float<T>(sums[j]);
  reinterpret_cast<Values*>(p.out)[place.row * packs + place.pack] = out;
}

template <class T>
int start(const MoeUnpermuteParams& p, void* stream) {
  constexpr int N = 16 / sizeof(T);
  if (p.width % N != 0 || p.y_stride % N != 0 || p.shared_stride % N != 0)
    return FOREBAY_UNSUPPORTED;
  const Tiling tiling(p.tokens, p.width / N, 1);
  if (!tiling.fits()) return FOREBAY_UNSUPPORTED;
  return launch(&moe_unpermute_kernel<T>, dim3(unsigned(tiling.blocks)), dim3(kTileThreads), 0,
                stream, p, tiling);
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_moe_unpermute(const MoeUnpermuteParams* params, void* stream) {
  using namespace forebay;
  const MoeUnpermuteParams& p = *params;
  if (p.tokens == 0 || p.width == 0) return FOREBAY_OK;
  if (p.top_k <= 0) return FOREBAY_INVALID;
  return with_float_dtype(p.dtype, [&](auto type) { return start<decltype(type)>(p, stream); });
}
