// The last kernel of sample: see sample.cu.
#pragma once
#include "sampling/search.cuh"
#include "sampling/workspace.cuh"

namespace forebay {
namespace {

// An id that stays: its weight; others: 0.
struct Weigher {
  float best, scale;
  uint64_t lowest;
  uint64_t cut;  // the smallest rank that stays

  template <class T>
  __device__ __forceinline__ uint64_t operator()(T value, int id, bool allowed) const {
    const float logit = to_float(value);
    const uint64_t weight = weight_of(exponent_of(logit, best, scale));
    const bool stays =
        allowed && weight >= lowest && (cut == 0 || rank_of(key_of(logit), uint32_t(id)) >= cut);
    return stays ? weight : 0;
  }
};

struct DrawShared {
  Digits digits;
  uint64_t sums[kMaxStretches];
};

// Finds the smallest rank that stays and leaves in shared.sums, per stretch, the weights of all
// that stay: from the candidates, or, where they cannot tell, from the whole row. All threads call
// it.
template <class T>
__device__ __forceinline__ uint64_t cut_row(const SampleParams& p, const Settings& settings,
                                            const Row<T>& row, const Workspace& workspace,
                                            DrawShared& shared, Weigher weigher) {
  const Plan plan = workspace.plan;
  const uint32_t count = workspace.num_candidates;
  const int stretches = stretches_of(p);
  bool listed = count <= kCandidates;
  // visit(rank, weight) for every candidate or id that stays so far, spread over the threads.
  const auto for_each = [&](auto visit) {
    if (listed) {
      for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
        const uint64_t rank = workspace.candidates[i];
        const float logit = logit_of(key_of_rank(rank));
        if (rank >= weigher.cut)
          visit(rank, weight_of(exponent_of(logit, weigher.best, weigher.scale)));
      }
      return;
    }
    for (int stretch = warp(); stretch < stretches; stretch += kWarps)
      row.template for_each<1>(stretch, [&](int id, const auto& logits, uint32_t allowed) {
#pragma unroll
        for (int i = 0; i < Row<T>::N; ++i) {
          const uint64_t weight = weigher(logits.values[i], id + i, allowed >> i & 1);
          const uint32_t key = key_of(to_float(logits.values[i]));
          if (weight > 0) visit(rank_of(key, uint32_t(id + i)), weight);
        }
      });
  };
  uint64_t sure_mass;
  block_scan(int(threadIdx.x) < kMaxStretches ? shared.sums[threadIdx.x] : 0, &sure_mass);
  for (int stage = 0; stage < 2;) {
    const bool by_mass = stage == 1;
    uint64_t wanted = listed ? plan.k_need : uint64_t(settings.top_k), base = 0;
    if (by_mass) {
      uint64_t mass = 0;
      for_each([&](uint64_t, uint64_t weight) { mass += weight; });
      block_scan(mass, &mass);
      base = listed ? sure_mass : 0;
      const uint64_t total = mass + (listed ? sure_mass + workspace.unsure_mass : 0);
      wanted = settings.top_p == Settings::kAllOfIt ? 0 : share_of(settings.top_p, total);
    }
    if (wanted > 0) {
      const uint64_t cut = search(shared.digits, by_mass, wanted, base, for_each);
      const float exponent = exponent_of(logit_of(key_of_rank(cut)), weigher.best, weigher.scale);
      const bool told = cut > 0 && (!by_mass || bin_of(exponent) <= plan.unsure);
      if (listed && !told) {
        listed = false;
        weigher.cut = 0;
        stage = 0;
        continue;
      }
      weigher.cut = cut > 0 ? cut : weigher.cut;
    }
    ++stage;
  }
  if (!listed) {
    for (int i = int(threadIdx.x); i < kMaxStretches; i += kThreads) shared.sums[i] = 0;
    __syncthreads();
  }
  int stretch = 0;
  uint64_t sum = 0;
  const auto add_up = [&] {
    if (sum > 0) atomicAdd(reinterpret_cast<Unsigned64*>(&shared.sums[stretch]), Unsigned64(sum));
  };
  for_each([&](uint64_t rank, uint64_t weight) {
    const int its = int(id_of_rank(rank)) / kStretch;
    if (its != stretch) {
      add_up();
      stretch = its;
      sum = 0;
    }
    sum += weight;
  });
  add_up();
  __syncthreads();
  return weigher.cut;
}

// The id at which the running sum of the weights, ids ascending, first exceeds the target. `sums`:
// running sums of the stretches. A warp calls it.
template <class T>
__device__ __forceinline__ int locate(const Row<T>& row, const Weigher& weigher,
                                      const uint64_t* sums, uint64_t target) {
  constexpr int N = Row<T>::N, kEach = kStretch / 32;
  int stretch = 0;
  for (int base = 0;; base += 32) {
    const unsigned above = __ballot_sync(kAllLanes, sums[base + lane()] > target);
    if (above == 0) continue;
    stretch = base + __ffs(int(above)) - 1;
    break;
  }
  target -= stretch > 0 ? sums[stretch - 1] : 0;
  int begin = stretch * kStretch;
  uint64_t sum = 0;
#pragma unroll 4
  for (int i = 0; i < kEach; i += N) {
    const int id = begin + lane() * kEach + i;
    const auto logits = row.load(id);
    const uint32_t allowed = row.allowed(id);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += weigher(logits.values[j], id + j, allowed >> j & 1);
  }
  uint64_t running = warp_scan(sum);
  int chosen = __ffs(int(__ballot_sync(kAllLanes, running > target))) - 1;
  target -= __shfl_sync(kAllLanes, running - sum, chosen);
  begin += chosen * kEach;
  for (int base = 0;; base += 32) {
    const int id = begin + base + lane();
    const auto logits = row.load(id);
    sum = weigher(logits.values[0], id, row.allowed(id) & 1);
    running = warp_scan(sum);
    const unsigned above = __ballot_sync(kAllLanes, running > target);
    if (above != 0) return begin + base + __ffs(int(above)) - 1;
    target -= __shfl_sync(kAllLanes, running, 31);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    draw_kernel(SampleParams p, int64_t first, int64_t end) {
  const int64_t draw = first + blockIdx.x;
  if (!leads(p, draw)) return;
  __shared__ DrawShared shared;
  int64_t last = draw + 1;
  while (last < end && shares_row(p, draw, last)) ++last;
  auto* tokens = static_cast<int32_t*>(p.token);
  auto* logprobs = static_cast<float*>(p.logprob);
  const Settings settings = settings_of(p, draw);
  Workspace& workspace = workspace_of(p, draw);
  Survey survey = {};
  if (settings.row >= 0) survey = read_survey(p, workspace);
  if (!survey.possible) {
    for (int64_t i = draw + threadIdx.x; i < last; i += kThreads) {
      tokens[i] = -1;
      if (logprobs != nullptr) logprobs[i] = float_of(0x7fc00000);
    }
    return;
  }
  const Row<T> row(p, settings.row);
  Weigher weigher = {survey.best, settings.scale, settings.lowest, 0};
  uint64_t total = 0;
  if (!settings.greedy) {
    for (int i = int(threadIdx.x); i < kMaxStretches; i += kThreads)
      shared.sums[i] = i < stretches_of(p) ? workspace.sums[i] : 0;
    __syncthreads();
    if (settings.truncates())
      weigher.cut = cut_row<T>(p, settings, row, workspace, shared, weigher);
    const uint64_t sum = int(threadIdx.x) < kMaxStretches ? shared.sums[threadIdx.x] : 0;
    const uint64_t below = block_scan(sum, &total);
    if (int(threadIdx.x) < kMaxStretches) shared.sums[threadIdx.x] = below + sum;
    __syncthreads();
  }
  for (int64_t i = draw + warp(); i < last; i += kWarps) {
    const int id = settings.greedy ? int(survey.best_id)
                                   : locate(row, weigher, shared.sums, target_of(p, i, total));
    if (lane() != 0) continue;
    tokens[i] = id;
    if (logprobs != nullptr)
      logprobs[i] = logprob_of(row.at(id), survey.largest, workspace.softmax_sum);
  }
}

}  // namespace
}  // namespace forebay
