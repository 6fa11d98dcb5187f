// What the GPU's routing and the CPU's share: scores as integers that order like them, and which
// lane of a warp holds which expert (softmax sums in that order).
#pragma once
#include "moe/sigmoid.cuh"

namespace forebay {

constexpr int kLanes = 32;
constexpr int kMaxValues = 16;  // of a lane

// Larger for a better score: a NaN is below all, and 0 is no score at all.
FOREBAY_DEVICE uint32_t rank_of(float score) {
  const uint32_t bits = float_bits(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 1;
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
FOREBAY_DEVICE float score_of(uint32_t rank) {
  if (rank <= 1) return float_of(0x7fc00000u);
  return float_of(rank >> 31 ? rank ^ 0x80000000u : ~rank);
}

// A group's rank from its two best experts'; `second` is 0 where it has but one.
FOREBAY_DEVICE uint32_t group_rank(uint32_t best, uint32_t second, bool softmax) {
  if (softmax || second == 0) return best;
  return rank_of(rounded_sum(score_of(best), score_of(second)));
}

// Groups lie side by side on equally many lanes; expert i of a group is on its lane i % lanes.
struct Layout {
  int lanes;   // a group's
  int values;  // a lane's, at most
};
inline Layout layout_of(const MoeRouteParams& p) {
  int groups = 1;
  while (groups < p.num_groups) groups *= 2;
  const int lanes = groups > kLanes ? 1 : kLanes / groups;
  return {lanes, (p.num_experts / p.num_groups + lanes - 1) / lanes};
}
inline bool supported(const MoeRouteParams& p) {
  return (p.dtype == FOREBAY_F32 || p.dtype == FOREBAY_BF16) && p.num_groups <= kLanes &&
         layout_of(p).values <= kMaxValues;
}
inline bool valid(const MoeRouteParams& p) {
  return p.num_experts > 0 && p.num_groups > 0 && p.num_experts % p.num_groups == 0 &&
         p.topk_groups > 0 && p.topk_groups <= p.num_groups && p.top_k > 0 &&
         p.top_k <= int64_t(p.topk_groups) * (p.num_experts / p.num_groups);
}

}  // namespace forebay
