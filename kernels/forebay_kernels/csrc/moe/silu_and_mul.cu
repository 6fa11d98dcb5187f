// The gated activation, with fp8 quantisation in the same pass where wanted.
#include "common/reduce.cuh"
#include "moe/sigmoid.cuh"
#include "moe/tiling.cuh"

namespace forebay {
namespace {

constexpr int kPacks = 2;  // a thread's, of gate and of up each

template <class T, bool kQuantise>
__global__ void __launch_bounds__(kTileThreads) silu_and_mul_kernel(SiluAndMulParams p,
                                                                    Tiling tiling) {
  constexpr int N = 16 / sizeof(T);
  using Values = Pack<T, N>;
  const Place place(tiling, kPacks);
  if (place.row >= p.rows) return;
  const int64_t packs = p.width / N;
  const T* x = static_cast<const T*>(p.x) + place.row * p.x_stride;
  const Values* gate = reinterpret_cast<const Values*>(x);
  const Values* up = reinterpret_cast<const Values*>(x + p.width);

  Values gates[kPacks], ups[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t at = place.pack + i * tiling.lanes;
    if (at >= packs) continue;
    gates[i] = gate[at];
    ups[i] = up[at];
  }
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t at = place.pack + i * tiling.lanes;
    const bool inside = at < packs;
    float values[N];
    if (inside) {
#pragma unroll
      for (int j = 0; j < N; ++j)
        values[j] = rounded_product(silu(to_float(gates[i].values[j])), to_float(ups[i].values[j]));
    }
    if constexpr (!kQuantise) {
      if (!inside) continue;
      Values out;
#pragma unroll
      for (int j = 0; j < N; ++j) out.values[j] = from_float<T>(values[j]);
      reinterpret_cast<Values*>(p.out)[place.row * packs + at] = out;
    } else {
      // As integers, magnitudes order like the floats they are, with infinities and NaN above.
      uint32_t largest = 0;
      if (inside) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const uint32_t magnitude = float_bits(values[j]) & 0x7fffffffu;
          largest = largest > magnitude ? largest : magnitude;
        }
      }
      // The lanes that share a group of 128 values: 16 of two-byte values, 32 of floats.
      constexpr int kLanes = 128 / N;
#pragma unroll
      for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
        const uint32_t other = __shfl_xor_sync(kAllLanes, largest, lanes);
        largest = largest > other ? largest : other;
      }
      if (!inside) continue;
      const Fp8Scale scale = fp8_scale(float_of(largest));
      Pack<e4m3, N> out;
#pragma unroll
      for (int j = 0; j < N; ++j)
        out.values[j] = from_float<e4m3>(rounded_product(values[j], scale.inverse));
      reinterpret_cast<Pack<e4m3, N>*>(p.out)[place.row * packs + at] = out;
      const int64_t groups = (p.width + 127) / 128;
      if (at % kLanes == 0)
        static_cast<float*>(p.scales)[place.row * groups + at / kLanes] = scale.scale;
    }
  }
}

template <class T>
int start(const SiluAndMulParams& p, void* stream) {
  constexpr int N = 16 / sizeof(T);
  if (p.width % N != 0 || p.x_stride % N != 0) return FOREBAY_UNSUPPORTED;
  const Tiling tiling(p.rows, p.width / N, kPacks);
  if (!tiling.fits()) return FOREBAY_UNSUPPORTED;
  const auto kernel =
      p.scales == nullptr ? &silu_and_mul_kernel<T, false> : &silu_and_mul_kernel<T, true>;
  return launch(kernel, dim3(unsigned(tiling.blocks)), dim3(kTileThreads), 0, stream, p, tiling);
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_silu_and_mul(const SiluAndMulParams* params, void* stream) {
  using namespace forebay;
  const SiluAndMulParams& p = *params;
  if (p.rows == 0 || p.width == 0) return FOREBAY_OK;
  if (p.scales != nullptr && p.group != 128) return FOREBAY_UNSUPPORTED;
  return with_float_dtype(p.dtype, [&](auto type) { return start<decltype(type)>(p, stream); });
}
