// How warps read rows, and sums over warps and blocks. For kernels only.
#pragma once
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "sampling/draw.cuh"

namespace forebay {

using Unsigned64 = unsigned long long;  // as atomicAdd spells it

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kStretch = 2048;  // ids that a warp reads; their weights are summed apart
constexpr int kMaxStretches = FOREBAY_SAMPLE_VOCAB / kStretch;
constexpr int kMaxBlocks = kMaxStretches / kWarps;
static_assert(kMaxStretches <= kThreads && kMaxBlocks <= 32);

__device__ __forceinline__ int lane() { return int(threadIdx.x) % 32; }
__device__ __forceinline__ int warp() { return int(threadIdx.x) / 32; }

__device__ __forceinline__ uint64_t warp_sum(uint64_t value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}
__device__ __forceinline__ uint64_t warp_max(uint64_t value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, value, lanes);
    value = other > value ? other : value;
  }
  return value;
}
// Of this lane and those below it.
__device__ __forceinline__ uint64_t warp_scan(uint64_t value) {
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const uint64_t other = __shfl_up_sync(kAllLanes, value, unsigned(lanes));
    if (lane() >= lanes) value += other;
  }
  return value;
}

// Of the threads below this one; every thread of the block calls it.
__device__ __forceinline__ uint64_t block_scan(uint64_t value, uint64_t* total) {
  __shared__ uint64_t sums[kWarps];
  const uint64_t inclusive = warp_scan(value);
  if (lane() == 31) sums[warp()] = inclusive;
  __syncthreads();
  if (warp() == 0) {
    const uint64_t sum = warp_scan(lane() < kWarps ? sums[lane()] : 0);
    if (lane() < kWarps) sums[lane()] = sum;
  }
  __syncthreads();
  const uint64_t below = inclusive - value + (warp() > 0 ? sums[warp() - 1] : 0);
  *total = sums[kWarps - 1];
  __syncthreads();
  return below;
}

template <class T>
class Row {
 public:
  static constexpr int N = 16 / sizeof(T);  // ids of a lane's access
  static constexpr int kSteps = kStretch / (32 * N);

  __device__ Row(const SampleParams& p, int64_t row)
      : logits_(static_cast<const T*>(p.logits) + row * p.row_stride),
        mask_(p.bitmask == nullptr
                  ? nullptr
                  : static_cast<const uint32_t*>(p.bitmask) + row * ((p.vocab + 31) / 32)),
        vocab_(int(p.vocab)),
        aligned_(reinterpret_cast<uintptr_t>(logits_) % 16 == 0) {}

  __device__ float at(int id) const { return to_float(logits_[id]); }

  // visit(id, logits, allowed) for groups of N neighbouring ids of the stretch, a warp side by
  // side; bit i of `allowed` is that of id + i. Beyond the vocabulary the logits are -inf. A lane
  // has kAtOnce accesses in flight.
  template <int kAtOnce, class Visit>
  __device__ __forceinline__ void for_each(int stretch, Visit visit) const {
    const int begin = stretch * kStretch + lane() * N;
    for (int step = 0; step < kSteps; step += kAtOnce) {
      if (stretch * kStretch + step * 32 * N >= vocab_) break;
      Pack<T, N> packs[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) packs[i] = load(begin + (step + i) * 32 * N);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int id = begin + (step + i) * 32 * N;
        if (id < vocab_) visit(id, packs[i], allowed(id));
      }
    }
  }

  __device__ Pack<T, N> load(int id) const {
    if (aligned_ && id + N <= vocab_) return *reinterpret_cast<const Pack<T, N>*>(logits_ + id);
    Pack<T, N> out;
#pragma unroll
    for (int i = 0; i < N; ++i)
      out.values[i] = id + i < vocab_ ? logits_[id + i] : from_float<T>(float_of(0xff800000));
    return out;
  }

  __device__ uint32_t allowed(int id) const {
    return mask_ == nullptr || id >= vocab_ ? ~0u : mask_[id / 32] >> (id % 32);
  }

 private:
  const T* logits_;
  const uint32_t* mask_;
  int vocab_;
  bool aligned_;
};

}  // namespace forebay
