// Residual add, RMS norm and fp8 quantisation in one pass: a block a row, the row in registers.
#include "common/launch.cuh"
#include "common/reduce.cuh"

namespace forebay {
namespace {

constexpr int kBytes = 16;  // of x, per access
constexpr int kMaxWidth = 16384;

template <class T, int kThreads, int kPacks, bool kQuantise>
__global__ void __launch_bounds__(kThreads) add_rms_norm_kernel(AddRmsNormParams p) {
  constexpr int N = kBytes / sizeof(T);
  using Values = Pack<T, N>;
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x;
  const int packs = int(p.width) / N;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
  T* total = static_cast<T*>(p.total) + row * p.width;

  Values values[kPacks];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int at = i * kThreads + int(threadIdx.x);
    if (at >= packs) continue;
    values[i] = reinterpret_cast<const Values*>(x)[at];
    if (p.residual != nullptr) {
      const Values other = reinterpret_cast<const Values*>(residual)[at];
#pragma unroll
      for (int j = 0; j < N; ++j)
        values[i].values[j] =
            from_float<T>(to_float(values[i].values[j]) + to_float(other.values[j]));
    }
    if (p.total != nullptr) reinterpret_cast<Values*>(total)[at] = values[i];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float value = to_float(values[i].values[j]);
      squares += value * value;
    }
  }
  const float mean = block_sum<kThreads>(squares, scratch) / float(p.width);
  const float factor = 1.0f / sqrtf(mean + p.eps);

#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int at = i * kThreads + int(threadIdx.x);
    const bool inside = at < packs;
    float normed[N];
    float largest = 0.0f;
    bool finite = true;
    if (inside) {
      const Values weight = reinterpret_cast<const Values*>(p.weight)[at];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        normed[j] = to_float(values[i].values[j]) * factor * to_float(weight.values[j]);
        if constexpr (kQuantise) {
          largest = fmaxf(largest, fabsf(normed[j]));
          finite = finite && fabsf(normed[j]) < float_of(0x7f800000);
        }
      }
    }
    if constexpr (!kQuantise) {
      if (!inside) continue;
      Values out;
#pragma unroll
      for (int j = 0; j < N; ++j) out.values[j] = from_float<T>(normed[j]);
      reinterpret_cast<Values*>(p.out)[row * packs + at] = out;
    } else {
      // The lanes that share a group of 128 values: 16 of two-byte values, 32 of floats.
      constexpr int kLanes = 128 / N;
      if (!finite) largest = float_of(0x7f800000);
#pragma unroll
      for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
      if (!inside) continue;
      const Fp8Scale scale = fp8_scale(largest);
      Pack<e4m3, N> out;
#pragma unroll
      for (int j = 0; j < N; ++j) out.values[j] = from_float<e4m3>(normed[j] * scale.inverse);
      reinterpret_cast<Pack<e4m3, N>*>(p.out)[row * packs + at] = out;
      const int groups = (int(p.width) + 127) / 128;
      if (at % kLanes == 0) static_cast<float*>(p.scales)[row * groups + at / kLanes] = scale.scale;
    }
  }
}

template <class T, int kThreads, int kPacks>
int start(const AddRmsNormParams& p, void* stream) {
  const auto kernel = p.scales == nullptr ? &add_rms_norm_kernel<T, kThreads, kPacks, false>
                                          : &add_rms_norm_kernel<T, kThreads, kPacks, true>;
  return launch(kernel, dim3(unsigned(p.rows)), dim3(kThreads), 0, stream, p);
}

template <class T>
int start(const AddRmsNormParams& p, void* stream) {
  constexpr int N = kBytes / sizeof(T);
  if (p.width % N != 0 || p.x_stride % N != 0 || p.residual_stride % N != 0)
    return FOREBAY_UNSUPPORTED;
  const int64_t packs = p.width / N;
  if (packs <= 128) return start<T, 128, 1>(p, stream);
  if (packs <= 256) return start<T, 256, 1>(p, stream);
  if (packs <= 512) return start<T, 256, 2>(p, stream);
  if (packs <= 1024) return start<T, 512, 2>(p, stream);
  return start<T, 1024, kMaxWidth / N / 1024>(p, stream);
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_add_rms_norm(const AddRmsNormParams* params, void* stream) {
  using namespace forebay;
  const AddRmsNormParams& p = *params;
  if (p.rows == 0 || p.width == 0) return FOREBAY_OK;
  if (p.width > kMaxWidth || p.rows > 0x7fffffff) return FOREBAY_UNSUPPORTED;
  if (p.scales != nullptr && p.group != 128) return FOREBAY_UNSUPPORTED;
  return with_float_dtype(p.dtype, [&](auto type) { return start<decltype(type)>(p, stream); });
}
