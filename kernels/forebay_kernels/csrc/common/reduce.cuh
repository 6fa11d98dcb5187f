// Sums and maxima over a warp or a block; every thread gets the result.
#pragma once
#include "common/dtypes.cuh"

namespace forebay {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}
__device__ __forceinline__ float warp_max(float value) {
  for (int lanes = 16; lanes > 0; lanes /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, lanes));
  return value;
}

// All threads of a block of kThreads (a multiple of 32) call it. `scratch`: 32 floats of shared
// memory that no other thread still reads.
template <int kThreads>
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  value = warp_sum(value);
  if constexpr (kThreads == 32) return value;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_sum(threadIdx.x % 32 < kThreads / 32 ? scratch[threadIdx.x % 32] : 0.0f);
}

}  // namespace forebay
