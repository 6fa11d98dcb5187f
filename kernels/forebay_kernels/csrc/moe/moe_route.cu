// Routing: a warp a token, its experts' scores in registers, one round of the warp for each expert
// that is chosen.
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "moe/route.cuh"

namespace forebay {
namespace {

constexpr uint32_t kNobody = 0xffffffffu;

// The best two of the lanes that share a group.
struct Best {
  uint32_t first = 0, second = 0;

  __device__ __forceinline__ void add(uint32_t rank) {
    const uint32_t loser = rank < first ? rank : first;
    first = rank > first ? rank : first;
    second = loser > second ? loser : second;
  }
  __device__ __forceinline__ void merge(int lanes) {
    for (int step = 1; step < lanes; step *= 2) {
      const uint32_t other_first = __shfl_xor_sync(kAllLanes, first, step);
      const uint32_t other_second = __shfl_xor_sync(kAllLanes, second, step);
      add(other_first);
      second = other_second > second ? other_second : second;
    }
  }
};

// A lane's experts. All loops over them unroll, so that they stay in registers.
template <int kValues>
struct Experts {
  int lanes, group, member, first;  // expert i is number first + i * lanes
  float scores[kValues];
  uint32_t ranks[kValues];  // of the scores with bias; 0: not, or no longer, to be had

  template <class T>
  __device__ __forceinline__ Experts(const MoeRouteParams& p, int lanes_, const T* logits)
      : lanes(lanes_) {
    const int lane = int(threadIdx.x) % kLanes, group_size = p.num_experts / p.num_groups;
    group = lane / lanes;
    member = lane % lanes;
    first = group * group_size + member;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const bool inside = group < p.num_groups && member + i * lanes < group_size;
      scores[i] = inside ? to_float(logits[first + i * lanes]) : 0.0f;
      ranks[i] = inside ? 1 : 0;
    }
  }

  __device__ __forceinline__ void apply_softmax() {
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const uint32_t rank = ranks[i] == 0 ? 0 : rank_of(scores[i]);
      top = rank > top ? rank : top;
    }
    const float largest = score_of(__reduce_max_sync(kAllLanes, top));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (ranks[i] == 0) continue;
      scores[i] = exp_of_negative(rounded_sum(scores[i], -largest));
      sum = rounded_sum(sum, scores[i]);
    }
    for (int step = kLanes / 2; step > 0; step /= 2)
      sum = rounded_sum(sum, __shfl_xor_sync(kAllLanes, sum, step));
#pragma unroll
    for (int i = 0; i < kValues; ++i) scores[i] = rounded_quotient(scores[i], sum);
  }

  __device__ __forceinline__ void apply_sigmoid() {
#pragma unroll
    for (int i = 0; i < kValues; ++i) scores[i] = sigmoid(scores[i]);
  }

  __device__ __forceinline__ void rank(const float* bias) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (ranks[i] == 0) continue;
      const bool biased = bias != nullptr;
      ranks[i] = rank_of(biased ? rounded_sum(scores[i], bias[first + i * lanes]) : scores[i]);
    }
  }

  __device__ __forceinline__ void drop_groups(const MoeRouteParams& p) {
    Best best;
#pragma unroll
    for (int i = 0; i < kValues; ++i) best.add(ranks[i]);
    best.merge(lanes);
    const uint32_t mine = group_rank(best.first, best.second, p.softmax != 0);
    int better = 0;
    for (int other = 0; other < p.num_groups; ++other) {
      const uint32_t theirs = __shfl_sync(kAllLanes, mine, other * lanes);
      better += theirs > mine || (theirs == mine && other < group);
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) ranks[i] = better < p.topk_groups ? ranks[i] : 0;
  }

  // Of all lanes: the number of the best expert, which is no longer to be had then, and its score.
  __device__ __forceinline__ int32_t take_best(float* its_score) {
    uint32_t rank = 0;
    float score = 0.0f;
    int at = 0;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (ranks[i] <= rank) continue;
      rank = ranks[i];
      score = scores[i];
      at = i;
    }
    const uint32_t expert = uint32_t(first + at * lanes);
    const uint32_t top = __reduce_max_sync(kAllLanes, rank);
    const uint32_t chosen = __reduce_min_sync(kAllLanes, rank == top ? expert : kNobody);
    const bool winner = rank == top && expert == chosen;
    const int owner = __ffs(int(__ballot_sync(kAllLanes, winner))) - 1;
    *its_score = __shfl_sync(kAllLanes, score, owner);
#pragma unroll
    for (int i = 0; i < kValues; ++i) ranks[i] = winner && i == at ? 0 : ranks[i];
    return int32_t(chosen);
  }
};

template <class T, int kValues>
__global__ void __launch_bounds__(128) moe_route_kernel(MoeRouteParams p, int lanes) {
  const int lane = int(threadIdx.x) % kLanes;
  const int64_t token = int64_t(blockIdx.x) * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  if (token >= p.tokens) return;
  Experts<kValues> experts(p, lanes, static_cast<const T*>(p.logits) + token * p.logits_stride);
  if (p.softmax)
    experts.apply_softmax();
  else
    experts.apply_sigmoid();
  experts.rank(static_cast<const float*>(p.bias));
  if (p.topk_groups < p.num_groups) experts.drop_groups(p);

  float* weights = static_cast<float*>(p.weights) + token * p.top_k;
  int32_t* ids = static_cast<int32_t*>(p.ids) + token * p.top_k;
  float sum = 0.0f, weight = 0.0f;  // lane k % 32 keeps the k-th
  int32_t id = 0;
  for (int k = 0; k < p.top_k; ++k) {
    float score;
    const int32_t chosen = experts.take_best(&score);
    sum = rounded_sum(sum, score);
    id = k % kLanes == lane ? chosen : id;
    weight = k % kLanes == lane ? score : weight;
    if (k % kLanes == kLanes - 1 && k + 1 < p.top_k) {
      ids[k - (kLanes - 1) + lane] = id;
      weights[k - (kLanes - 1) + lane] = weight;
    }
  }
  const float divisor = p.renormalise ? rounded_sum(sum, 1e-20f) : 1.0f;
  const int last = (p.top_k - 1) / kLanes * kLanes + lane;
  if (last < p.top_k) {
    ids[last] = id;
    weights[last] = rounded_product(rounded_quotient(weight, divisor), p.scale);
  }
  // What the lane itself wrote above, where more than 32 were chosen.
  for (int k = last - kLanes; k >= 0; k -= kLanes)
    weights[k] = rounded_product(rounded_quotient(weights[k], divisor), p.scale);
}

template <class T, int kValues>
int start(const MoeRouteParams& p, int lanes, void* stream) {
  // Few tokens: one a block, so that as many processors as possible share them.
  const int64_t warps = p.tokens <= 1024 ? 1 : 4;
  const int64_t blocks = (p.tokens + warps - 1) / warps;
  if (blocks > 0x7fffffff) return FOREBAY_UNSUPPORTED;
  return launch(&moe_route_kernel<T, kValues>, dim3(unsigned(blocks)),
                dim3(unsigned(warps * kLanes)), 0, stream, p, lanes);
}

template <class T>
int start(const MoeRouteParams& p, void* stream) {
  const Layout layout = layout_of(p);
  if (layout.values <= 4) return start<T, 4>(p, layout.lanes, stream);
  if (layout.values <= 8) return start<T, 8>(p, layout.lanes, stream);
  return start<T, kMaxValues>(p, layout.lanes, stream);
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_moe_route(const MoeRouteParams* params, void* stream) {
  using namespace forebay;
  const MoeRouteParams& p = *params;
  if (!valid(p)) return FOREBAY_INVALID;
  if (!supported(p)) return FOREBAY_UNSUPPORTED;
  if (p.tokens == 0) return FOREBAY_OK;
  return p.dtype == FOREBAY_F32 ? start<float>(p, stream) : start<bf16>(p, stream);
}
