// The third kernel of sample: see sample.cu.
#pragma once
#include "sampling/workspace.cuh"

namespace forebay {
namespace {

constexpr int kStaged = 1024;  // candidates that a block gathers before it adds them to the list

// All threads of the block call it and get the same.
__device__ __forceinline__ Plan make_plan(const Settings& settings, const uint32_t* histogram) {
  constexpr int kEach = kBins / kThreads;
  __shared__ Plan plan;
  __shared__ uint32_t below_k;
  const int first = int(threadIdx.x) * kEach;
  uint32_t counts[kEach];
  uint64_t count = 0, total;
#pragma unroll
  for (int i = 0; i < kEach; ++i) count += counts[i] = histogram[first + i];
  if (threadIdx.x == 0) {
    plan = Plan::whole_row();
    below_k = 0;
  }
  uint64_t below = block_scan(count, &total);
  const uint64_t top_k = uint64_t(settings.top_k);
  if (top_k > 0 && top_k < total && below < top_k && below + count >= top_k) {
    int bin = first;
    for (int i = 0; i < kEach && below + counts[i] < top_k; ++i) {
      below += counts[i];
      bin = first + i + 1;
    }
    plan.k_bin = bin;
    plan.k_need = below_k = uint32_t(top_k - below);
  }
  __syncthreads();
  const int k_bin = plan.k_bin;
  if (settings.top_p == Settings::kAllOfIt) {
    const Plan out = {k_bin, k_bin, k_bin, plan.k_need};
    __syncthreads();
    return out;
  }
  uint64_t least[kEach], most[kEach], sum_least = 0, sum_most = 0, all_least, all_most;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int bin = first + i;
    const uint32_t stay = bin < k_bin ? counts[i] : bin == k_bin ? below_k : 0;
    sum_least += least[i] = stay * least_of_bin(bin);
    sum_most += most[i] = stay * most_of_bin(bin);
  }
  uint64_t running_least = block_scan(sum_least, &all_least);
  uint64_t running_most = block_scan(sum_most, &all_most);
  const auto split = [&] {
    return Split{running_least, running_most, all_least - running_least, all_most - running_most};
  };
  if (threadIdx.x == 0) plan.unsure = k_bin < kBins ? k_bin : kLastBin;
  __syncthreads();
  uint32_t before_k = 0;
  bool may = split().may_hold(settings.top_p), must = split().must_hold(settings.top_p);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    running_most += most[i];
    running_least += least[i];
    const bool may_now = split().may_hold(settings.top_p);
    const bool must_now = split().must_hold(settings.top_p);
    if (may_now && !may) plan.sure = first + i;
    if (must_now && !must) plan.unsure = first + i;
    may = may_now;
    must = must_now;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (first + i >= plan.sure && first + i <= plan.unsure && first + i < k_bin)
      before_k += counts[i];
  if (k_bin < kBins && before_k > 0) atomicAdd(&plan.k_need, before_k);
  __syncthreads();
  const Plan out = plan;
  __syncthreads();
  return out;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) weigh_kernel(SampleParams p, int64_t first) {
  const int64_t draw = first + blockIdx.y;
  if (!leads(p, draw)) return;
  const Settings settings = settings_of(p, draw);
  const bool wants_logprob = p.logprob != nullptr;
  if (settings.row < 0 || (settings.greedy && !wants_logprob)) return;
  Workspace& workspace = workspace_of(p, draw);
  const Survey survey = read_survey(p, workspace);
  if (!survey.possible) return;
  __shared__ uint64_t staged[kStaged];
  __shared__ uint32_t num_staged, place;
  if (threadIdx.x == 0) num_staged = 0;
  Plan plan = Plan::whole_row();
  if (settings.truncates()) plan = make_plan(settings, workspace.histogram);
  if (blockIdx.x == 0 && threadIdx.x == 0) workspace.plan = plan;
  __syncthreads();

  uint64_t sure_mass = 0, unsure_mass = 0, softmax_sum = 0;
  const Row<T> row(p, settings.row);
  const int stretch = int(blockIdx.x) * kWarps + warp();
  row.template for_each<4>(stretch, [&](int id, const auto& logits, uint32_t allowed) {
#pragma unroll
    for (int i = 0; i < Row<T>::N; ++i) {
      const float logit = to_float(logits.values[i]);
      if (wants_logprob) softmax_sum += weight_of(exponent_of(logit, survey.largest, kLog2e));
      if (settings.greedy || !(allowed >> i & 1)) continue;
      const float exponent = exponent_of(logit, survey.best, settings.scale);
      const uint64_t weight = weight_of(exponent);
      if (weight < settings.lowest) continue;
      const int bin = bin_of(exponent);
      if (plan.candidate(bin)) {
        const uint64_t rank = rank_of(key_of(logit), uint32_t(id + i));
        const uint32_t slot = atomicAdd(&num_staged, 1u);
        if (slot < kStaged) {
          staged[slot] = rank;
        } else {
          const uint32_t listed = atomicAdd(&workspace.num_candidates, 1u);
          if (listed < kCandidates) workspace.candidates[listed] = rank;
        }
      } else if (bin < plan.sure) {
        sure_mass += weight;
      } else if (bin < plan.k_bin) {
        unsure_mass += weight;
      }
    }
  });
  sure_mass = warp_sum(sure_mass);
  unsure_mass = warp_sum(unsure_mass);
  if (wants_logprob) softmax_sum = warp_sum(softmax_sum);
  if (lane() == 0 && stretch < stretches_of(p)) {
    workspace.sums[stretch] = sure_mass;
    if (unsure_mass > 0)
      atomicAdd(reinterpret_cast<Unsigned64*>(&workspace.unsure_mass), Unsigned64(unsure_mass));
    if (wants_logprob)
      atomicAdd(reinterpret_cast<Unsigned64*>(&workspace.softmax_sum), Unsigned64(softmax_sum));
  }
  __syncthreads();
  const uint32_t count = num_staged < kStaged ? num_staged : kStaged;
  if (threadIdx.x == 0 && count > 0) place = atomicAdd(&workspace.num_candidates, count);
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < count; i += kThreads)
    if (place + i < kCandidates) workspace.candidates[place + i] = staged[i];
}

}  // namespace
}  // namespace forebay
