// sample on a GPU: four kernels, none of which waits for the host.
//
//   survey   the largest logit of every row, and whether the row has a NaN or +inf
//   count    a histogram of exponents                       (rows with top-k or top-p)
//   weigh    sums of weights, one per stretch of 2,048 ids; candidates at the cuts go to a list
//   draw     cuts among the candidates, adds up, draws; a warp a draw
//
// A row is spread over blocks of 32,768 ids, a warp a stretch: at 64 rows of 131,072 ids that is
// 256 blocks, two on each multiprocessor, and one row alone still has four. A kernel's end is the
// only barrier that a row's blocks need, so any device can run this. The row is read three times
// and no more: the first time from memory, then (64 fp32 rows of 131,072 ids are 34 MB) mostly
// from a large second-level cache. Histograms over the whole row hold 32-bit counts, the one kind
// of shared-memory atomic that is fast; the counts bracket the cuts so closely that a few hundred
// to a few thousand ids remain candidates, and only these are searched exactly, with masses. When
// they do not fit their list (a row of equal logits, say) the last kernel searches the whole row.
#include "sampling/search.cuh"

namespace forebay {
namespace {

constexpr int kStaged = 1024;
constexpr int kCandidates = 9216;

struct alignas(128) Workspace {
  uint64_t best[kMaxBlocks];     // of a block's ids: key << 32 | ~id; 0: none is possible
  uint32_t largest[kMaxBlocks];  // key, of all ids, whatever the bitmask says
  uint32_t broken[kMaxBlocks];
  uint32_t histogram[kBins];
  uint64_t sums[kMaxStretches];
  uint64_t softmax_sum;  // at temperature 1, of all ids
  uint64_t unsure_mass;  // of ids between the candidates
  Plan plan;
  uint32_t num_candidates;
  uint64_t candidates[kCandidates];
};
static_assert(sizeof(Workspace) <= FOREBAY_SAMPLE_WORKSPACE);

__device__ __forceinline__ Workspace& workspace_of(const SampleParams& p, int64_t draw) {
  const int64_t slot = draw % FOREBAY_SAMPLE_DRAWS;
  auto* bytes = static_cast<unsigned char*>(p.workspace) + slot * FOREBAY_SAMPLE_WORKSPACE;
  return *reinterpret_cast<Workspace*>(bytes);
}

// The first of the draws that share a row works for all of them.
__device__ __forceinline__ bool leads(const SampleParams& p, int64_t draw) {
  return draw % FOREBAY_SAMPLE_DRAWS == 0 || !shares_row(p, draw - 1, draw);
}

__device__ __forceinline__ int stretches_of(const SampleParams& p) {
  return int((p.vocab + kStretch - 1) / kStretch);
}

struct Survey {
  bool possible;  // there is an id to draw, and no logit is NaN or +inf
  uint32_t best_id;
  float best, largest;
};

__device__ __forceinline__ Survey read_survey(const SampleParams& p, const Workspace& workspace) {
  const int num_blocks = (stretches_of(p) + kWarps - 1) / kWarps;
  const bool inside = lane() < num_blocks;
  const uint64_t best = warp_max(inside ? workspace.best[lane()] : 0);
  const uint64_t largest = warp_max(uint64_t(inside ? workspace.largest[lane()] : 0));
  const bool broken = __any_sync(kAllLanes, inside && workspace.broken[lane()] != 0);
  return {best > 0 && !broken, ~uint32_t(best), logit_of(uint32_t(best >> 32)),
          logit_of(uint32_t(largest))};
}

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

template <class T>
int start(const SampleParams& p, void* stream) {
  const unsigned parts = unsigned((p.vocab + kStretch * kWarps - 1) / (kStretch * kWarps));
  for (int64_t first = 0; first < p.draws; first += FOREBAY_SAMPLE_DRAWS) {
    const int64_t left = p.draws - first;
    const int64_t count = left < FOREBAY_SAMPLE_DRAWS ? left : FOREBAY_SAMPLE_DRAWS;
    const dim3 grid(parts, unsigned(count));
    int status = launch(&survey_kernel<T>, grid, dim3(kThreads), 0, stream, p, first);
    if (status == FOREBAY_OK)
      status = launch(&count_kernel<T>, grid, dim3(kThreads), 0, stream, p, first);
    if (status == FOREBAY_OK)
      status = launch(&weigh_kernel<T>, grid, dim3(kThreads), 0, stream, p, first);
    if (status == FOREBAY_OK)
      status = launch(&draw_kernel<T>, dim3(unsigned(count)), dim3(kThreads), 0, stream, p, first,
                      first + count);
    if (status != FOREBAY_OK) return status;
  }
  return FOREBAY_OK;
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_sample(const SampleParams* params, void* stream) {
  using namespace forebay;
  const SampleParams& p = *params;
  if (p.draws == 0) return FOREBAY_OK;
  if (p.vocab < 1 || p.vocab > FOREBAY_SAMPLE_VOCAB) return FOREBAY_UNSUPPORTED;
  switch (p.dtype) {
    case FOREBAY_F32:
      return start<float>(p, stream);
    case FOREBAY_BF16:
      return start<bf16>(p, stream);
    default:
      return FOREBAY_UNSUPPORTED;
  }
}
