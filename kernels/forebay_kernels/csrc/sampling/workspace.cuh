// What the kernels of sample leave for one another, draw by draw. For kernels only.
#pragma once
#include "sampling/row.cuh"

namespace forebay {
namespace {

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

}  // namespace
}  // namespace forebay
