// The first two kernels of sample: see sample.cu.
#pragma once
#include "sampling/workspace.cuh"

namespace forebay {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, 2) survey_kernel(SampleParams p, int64_t first) {
  const int64_t draw = first + blockIdx.y;
  if (!leads(p, draw)) return;
  const Settings settings = settings_of(p, draw);
  if (settings.row < 0) return;
  __shared__ uint64_t bests[kWarps];
  __shared__ uint32_t largests[kWarps];
  __shared__ bool broken[kWarps];
  Workspace& workspace = workspace_of(p, draw);
  const int part = int(blockIdx.x);
  for (int i = part * kThreads + int(threadIdx.x); i < kBins; i += int(gridDim.x) * kThreads)
    workspace.histogram[i] = 0;
  if (part == 0 && threadIdx.x == 0) {
    workspace.softmax_sum = 0;
    workspace.unsure_mass = 0;
    workspace.num_candidates = 0;
  }
  uint32_t best_key = kKeyOfMinusInfinity, best_id = 0;
  uint32_t largest = 0, smallest = ~0u;
  const Row<T> row(p, settings.row);
  row.template for_each<4>(part * kWarps + warp(),
                           [&](int id, const auto& logits, uint32_t allowed) {
#pragma unroll
                             for (int i = 0; i < Row<T>::N; ++i) {
                               const uint32_t key = key_of(to_float(logits.values[i]));
                               largest = key > largest ? key : largest;
                               smallest = key < smallest ? key : smallest;
                               if ((allowed >> i & 1) && key > best_key) {
                                 best_key = key;
                                 best_id = uint32_t(id + i);
                               }
                             }
                           });
  const bool any = best_key > kKeyOfMinusInfinity;
  const uint64_t best = warp_max(any ? uint64_t(best_key) << 32 | uint32_t(~best_id) : 0);
  const bool wrong =
      __any_sync(kAllLanes, largest >= kKeyOfInfinity || smallest < kKeyOfMinusInfinity);
  largest = uint32_t(warp_max(uint64_t(largest)));
  if (lane() == 0) {
    bests[warp()] = best;
    largests[warp()] = largest;
    broken[warp()] = wrong;
  }
  __syncthreads();
  if (warp() > 0) return;
  const bool inside = lane() < kWarps;
  const uint64_t block_best = warp_max(inside ? bests[lane()] : 0);
  const uint64_t block_largest = warp_max(uint64_t(inside ? largests[lane()] : 0));
  const bool block_broken = __any_sync(kAllLanes, inside && broken[lane()]);
  if (lane() == 0) {
    workspace.best[part] = block_best;
    workspace.largest[part] = uint32_t(block_largest);
    workspace.broken[part] = block_broken;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) count_kernel(SampleParams p, int64_t first) {
  const int64_t draw = first + blockIdx.y;
  if (!leads(p, draw)) return;
  const Settings settings = settings_of(p, draw);
  if (settings.row < 0 || !settings.truncates()) return;
  Workspace& workspace = workspace_of(p, draw);
  const Survey survey = read_survey(p, workspace);
  if (!survey.possible) return;
  __shared__ uint32_t histogram[kBins];
  for (int i = int(threadIdx.x); i < kBins; i += kThreads) histogram[i] = 0;
  __syncthreads();
  const Row<T> row(p, settings.row);
  row.template for_each<4>(int(blockIdx.x) * kWarps + warp(), [&](int, const auto& logits,
                                                                  uint32_t allowed) {
#pragma unroll
    for (int i = 0; i < Row<T>::N; ++i) {
      const float exponent = exponent_of(to_float(logits.values[i]), survey.best, settings.scale);
      if (!(allowed >> i & 1) || !(exponent > kLowestExponent)) continue;
      if (settings.lowest > 1 && weight_of(exponent) < settings.lowest) continue;
      atomicAdd(&histogram[bin_of(exponent)], 1u);
    }
  });
  __syncthreads();
  for (int i = int(threadIdx.x); i < kBins; i += kThreads)
    if (histogram[i] > 0) atomicAdd(&workspace.histogram[i], histogram[i]);
}

}  // namespace
}  // namespace forebay
