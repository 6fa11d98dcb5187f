// The CPU's routing, with the GPU's bits: the same operations in the same order.
#include <algorithm>

#include "common/parallel.h"
#include "moe/route.cuh"

namespace forebay {
namespace {

constexpr int kMaxExperts = kLanes * kMaxValues;
constexpr int64_t kBytesEach = 32;  // that could be copied in the time an expert's score takes

struct Row {
  alignas(64) float scores[kMaxExperts];
  alignas(64) uint32_t ranks[kMaxExperts];
};

// In float, added as the lanes of a warp add: each its own, then halves of the warp.
float sum_of(const MoeRouteParams& p, const Layout& layout, const float* scores) {
  const int group_size = p.num_experts / p.num_groups;
  float sums[kLanes] = {};
  for (int group = 0; group < p.num_groups; ++group)
    for (int i = 0; i < group_size; ++i)
      sums[group * layout.lanes + i % layout.lanes] += scores[group * group_size + i];
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int lane = 0; lane < step; ++lane) sums[lane] += sums[lane + step];
  return sums[0];
}

void softmax(const MoeRouteParams& p, const Layout& layout, float* scores) {
  uint32_t top = 0;
  for (int i = 0; i < p.num_experts; ++i) top = std::max(top, rank_of(scores[i]));
  const float largest = score_of(top);
  for (int i = 0; i < p.num_experts; ++i) scores[i] = exp_of_negative(scores[i] - largest);
  const float sum = sum_of(p, layout, scores);
  for (int i = 0; i < p.num_experts; ++i) scores[i] /= sum;
}

// Ranks of the groups that are not among the best become 0.
void drop_groups(const MoeRouteParams& p, uint32_t* ranks) {
  const int group_size = p.num_experts / p.num_groups;
  uint32_t groups[kLanes];
  for (int group = 0; group < p.num_groups; ++group) {
    uint32_t best = 0, second = 0;
    for (int i = 0; i < group_size; ++i) {
      const uint32_t rank = ranks[group * group_size + i];
      second = std::max(second, std::min(best, rank));
      best = std::max(best, rank);
    }
    groups[group] = group_rank(best, second, p.softmax != 0);
  }
  for (int group = 0; group < p.num_groups; ++group) {
    int better = 0;
    for (int other = 0; other < p.num_groups; ++other)
      better += groups[other] > groups[group] || (groups[other] == groups[group] && other < group);
    if (better >= p.topk_groups) std::fill_n(ranks + group * group_size, group_size, 0u);
  }
}

template <class T>
void route(const MoeRouteParams& p, const Layout& layout, int64_t token, Row& row) {
  const T* logits = static_cast<const T*>(p.logits) + token * p.logits_stride;
  const float* bias = static_cast<const float*>(p.bias);
  float* weights = static_cast<float*>(p.weights) + token * p.top_k;
  int32_t* ids = static_cast<int32_t*>(p.ids) + token * p.top_k;
  const int experts = p.num_experts;
  if (p.softmax) {
    for (int i = 0; i < experts; ++i) row.scores[i] = to_float(logits[i]);
    softmax(p, layout, row.scores);
  } else {
    for (int i = 0; i < experts; ++i) row.scores[i] = sigmoid(to_float(logits[i]));
  }
  if (bias == nullptr) {
    for (int i = 0; i < experts; ++i) row.ranks[i] = rank_of(row.scores[i]);
  } else {
    for (int i = 0; i < experts; ++i) row.ranks[i] = rank_of(row.scores[i] + bias[i]);
  }
  if (p.topk_groups < p.num_groups) drop_groups(p, row.ranks);
  float sum = 0.0f;
  for (int k = 0; k < p.top_k; ++k) {
    uint32_t top = 0;
    for (int i = 0; i < experts; ++i) top = std::max(top, row.ranks[i]);
    int chosen = 0;
    while (row.ranks[chosen] != top) ++chosen;
    row.ranks[chosen] = 0;
    ids[k] = chosen;
    weights[k] = row.scores[chosen];
    sum += weights[k];
  }
  const float divisor = p.renormalise ? sum + 1e-20f : 1.0f;
  for (int k = 0; k < p.top_k; ++k) weights[k] = weights[k] / divisor * p.scale;
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_moe_route(const MoeRouteParams* params, void*) {
  using namespace forebay;
  const MoeRouteParams& p = *params;
  if (!valid(p)) return FOREBAY_INVALID;
  if (!supported(p)) return FOREBAY_UNSUPPORTED;
  const Layout layout = layout_of(p);
  parallel_for(p.tokens, p.num_experts * kBytesEach, p.num_threads,
               [&](int64_t begin, int64_t end) {
                 Row row;
                 for (int64_t token = begin; token < end; ++token)
                   p.dtype == FOREBAY_F32 ? route<float>(p, layout, token, row)
                                          : route<bf16>(p, layout, token, row);
               });
  return FOREBAY_OK;
}
