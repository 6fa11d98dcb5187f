// The gated activation, with fp8 quantisation in the same pass where wanted.
#include "common/reduce.cuh"
#include "moe/sigmoid.cuh"
#include "moe/tiling.cuh"

namespace forebay {
namespace {

__device__ __forceinline__ float larger_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
#else
  return a > b || a != a ? a : b;
#endif
}

struct TwoCodes {
  uint16_t bits;
};
__device__ __forceinline__ TwoCodes two_codes(float first, float second) {
#if defined(__CUDA_ARCH__)
  return {__nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3)};
#else
  return {uint16_t(from_float<e4m3>(first).bits | from_float<e4m3>(second).bits << 8)};
#endif
}

// What a thread has: kUnits units of kPacks accesses that lie side by side, so that one scale
// serves more values where there are scales.
template <class T, bool kQuantise>
struct Share {
  static constexpr int kPacks = kQuantise ? 2 : 1, kUnits = kQuantise ? 1 : 2;
  static constexpr int kPack = 16 / sizeof(T);
  static constexpr int kValues = kPacks * kPack;  // of a unit
};

template <class T, bool kQuantise>
__global__ void __launch_bounds__(kTileThreads)
    silu_and_mul_kernel(SiluAndMulParams p, Tiling tiling) {
  using S = Share<T, kQuantise>;
  constexpr int kUnits = S::kUnits, kPacks = S::kPacks, kPack = S::kPack, kValues = S::kValues;
  using Values = Pack<T, kPack>;
  const Place place(tiling, kUnits);
  if (place.row >= p.rows) return;
  const int64_t units = p.width / kValues;
  const T* gate = static_cast<const T*>(p.x) + place.row * p.x_stride;
  const T* up = gate + p.width;

  Values gates[kUnits][kPacks], ups[kUnits][kPacks];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int64_t at = place.pack + i * tiling.lanes();
    if (at >= units) continue;
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      gates[i][j] = reinterpret_cast<const Values*>(gate + at * kValues)[j];
      ups[i][j] = reinterpret_cast<const Values*>(up + at * kValues)[j];
    }
  }
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int64_t at = place.pack + i * tiling.lanes();
    const bool inside = at < units;
    float values[kValues];
    if (inside) {
#pragma unroll
      for (int j = 0; j < kValues; ++j)
        values[j] = rounded_product(silu(to_float(gates[i][j / kPack].values[j % kPack])),
                                    to_float(ups[i][j / kPack].values[j % kPack]));
    }
    if constexpr (!kQuantise) {
      if (!inside) continue;
      Pack<T, kValues> out;
#pragma unroll
      for (int j = 0; j < kValues; ++j) out.values[j] = from_float<T>(values[j]);
      reinterpret_cast<Pack<T, kValues>*>(p.out)[place.row * units + at] = out;
    } else {
      float largest = 0.0f;
      if (inside) {
#pragma unroll
        for (int j = 0; j < kValues; ++j) largest = larger_or_nan(largest, fabsf(values[j]));
      }
      // The lanes that share a group of 128 values: 8 of two-byte values, 16 of floats.
      constexpr int kLanes = 128 / kValues;
#pragma unroll
      for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
        largest = larger_or_nan(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
      if (!inside) continue;
      const Fp8Scale scale = fp8_scale(largest);
      Pack<TwoCodes, kValues / 2> out;
#pragma unroll
      for (int j = 0; j < kValues; j += 2)
        out.values[j / 2] = two_codes(rounded_product(values[j], scale.inverse),
                                      rounded_product(values[j + 1], scale.inverse));
      reinterpret_cast<Pack<TwoCodes, kValues / 2>*>(p.out)[place.row * units + at] = out;
      const int64_t groups = (p.width + 127) / 128;
      if (at % kLanes == 0)
        static_cast<float*>(p.scales)[place.row * groups + at / kLanes] = scale.scale;
    }
  }
}

template <class T, bool kQuantise>
int start(const SiluAndMulParams& p, void* stream) {
  using S = Share<T, kQuantise>;
  if (p.width % S::kValues != 0 || p.x_stride % S::kPack != 0) return FOREBAY_UNSUPPORTED;
  const Tiling tiling(p.rows, p.width / S::kValues, S::kUnits);
  if (!tiling.fits()) return FOREBAY_UNSUPPORTED;
  return launch(&silu_and_mul_kernel<T, kQuantise>, dim3(unsigned(tiling.blocks)),
                dim3(kTileThreads), 0, stream, p, tiling);
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_silu_and_mul(const SiluAndMulParams* params, void* stream) {
  using namespace forebay;
  const SiluAndMulParams& p = *params;
  if (p.rows == 0 || p.width == 0) return FOREBAY_OK;
  if (p.scales != nullptr && p.group != 128) return FOREBAY_UNSUPPORTED;
  return with_float_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    return p.scales == nullptr ? start<T, false>(p, stream) : start<T, true>(p, stream);
  });
}
