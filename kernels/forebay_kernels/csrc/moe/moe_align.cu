// A stable counting sort of choices by expert. Every block takes a stretch of the choices, every
// warp of it a stretch of that, so that ranks follow from counts and no atomic decides an order.
// Few choices: one block, one launch. Many: one launch counts, block by block, the next places.
#include "common/launch.cuh"
#include "common/reduce.cuh"

namespace forebay {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxExperts = 512;

// The choices of a warp: [begin, end).
struct Stretch {
  int64_t begin, end;

  __device__ __forceinline__ explicit Stretch(const MoeAlignParams& p) {
    const int64_t rounds =
        (p.choices + int64_t(p.num_blocks) * kThreads - 1) / (int64_t(p.num_blocks) * kThreads);
    const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    begin = warp * rounds * 32;
    end = begin + rounds * 32 < p.choices ? begin + rounds * 32 : p.choices;
  }
};

// Of a lane's choice, or -1.
__device__ __forceinline__ int expert_of(const MoeAlignParams& p, int64_t choice, int64_t end) {
  if (choice >= end) return -1;
  const int id = static_cast<const int32_t*>(p.ids)[choice];
  return id >= 0 && id < p.num_experts ? id : -1;
}

// How many choices of every expert each warp has: counts[warp * num_experts + expert]. Ends with a
// barrier of the block.
__device__ __forceinline__ void count(const MoeAlignParams& p, const Stretch& stretch,
                                      int* counts) {
  const int lane = int(threadIdx.x) % 32;
  for (int i = int(threadIdx.x); i < kWarps * p.num_experts; i += kThreads) counts[i] = 0;
  __syncthreads();
  int* own = counts + int(threadIdx.x) / 32 * p.num_experts;
  for (int64_t at = stretch.begin; at < stretch.end; at += 32) {
    const int id = expert_of(p, at + lane, stretch.end);
    const unsigned same = __match_any_sync(kAllLanes, id);
    if (id >= 0 && __ffs(int(same)) - 1 == lane) own[id] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads) moe_count_kernel(MoeAlignParams p) {
  FOREBAY_DYNAMIC_SHARED(shared);
  int* counts = reinterpret_cast<int*>(shared);
  count(p, Stretch(p), counts);
  const int expert = int(threadIdx.x);
  if (expert >= p.num_experts) return;
  int sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += counts[warp * p.num_experts + expert];
  static_cast<int32_t*>(p.workspace)[int64_t(blockIdx.x) * p.num_experts + expert] = sum;
}

// The sum of `value` over this thread and those before it; the block's total goes to *total.
__device__ __forceinline__ int sum_up_to_here(int value, int* scratch, int* total) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, value, unsigned(step));
    if (lane >= step) value += other;
  }
  if (lane == 31) scratch[warp] = value;
  __syncthreads();
  int sum = scratch[lane];
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, unsigned(step));
    if (lane >= step) sum += other;
  }
  *total = __shfl_sync(kAllLanes, sum, 31);
  const int before = __shfl_sync(kAllLanes, sum, warp == 0 ? 0 : warp - 1);
  return value + (warp == 0 ? 0 : before);
}

__global__ void __launch_bounds__(kThreads) moe_place_kernel(MoeAlignParams p) {
  FOREBAY_DYNAMIC_SHARED(shared);
  __shared__ int scratch[32];
  __shared__ int starts[kMaxExperts];          // an expert's first row
  __shared__ int ends[kMaxExperts];            // and the one after its last choice
  int* next = reinterpret_cast<int*>(shared);  // per warp and expert: the row of its next choice
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int experts = p.num_experts, expert = int(threadIdx.x);
  const Stretch stretch(p);
  count(p, stretch, next);

  int before = 0, all = 0;  // choices of this thread's expert: in earlier blocks, in all
  if (expert < experts) {
    if (p.num_blocks > 1) {
      const int32_t* sums = static_cast<const int32_t*>(p.workspace) + expert;
#pragma unroll 8
      for (int block = 0; block < p.num_blocks; ++block) {
        const int sum = sums[int64_t(block) * experts];
        before += block < int(blockIdx.x) ? sum : 0;
        all += sum;
      }
    } else {
      for (int i = 0; i < kWarps; ++i) all += next[i * experts + expert];
    }
  }
  const int padded = (all + p.multiple - 1) / p.multiple * p.multiple;
  int in_use = 0;
  const int start = sum_up_to_here(padded, scratch, &in_use) - padded;
  if (expert < experts) {
    int row = start + before;
    for (int i = 0; i < kWarps; ++i) {
      const int own = next[i * experts + expert];
      next[i * experts + expert] = row;
      row += own;
    }
    starts[expert] = start;
    ends[expert] = start + all;
    if (blockIdx.x == 0) {
      int32_t* offsets = static_cast<int32_t*>(p.offsets);
      offsets[expert] = start;
      if (expert == experts - 1) offsets[experts] = in_use;
    }
  }
  __syncthreads();

  int32_t* order = static_cast<int32_t*>(p.order);
  int32_t* inverse = static_cast<int32_t*>(p.inverse);
  int* own = next + warp * experts;
  for (int64_t at = stretch.begin; at < stretch.end; at += 32) {
    const int id = expert_of(p, at + lane, stretch.end);
    const unsigned same = __match_any_sync(kAllLanes, id);
    const unsigned earlier = same & ((1u << lane) - 1);
    const int row = id < 0 ? -1 : own[id] + __popc(earlier);
    __syncwarp();
    if (id >= 0 && earlier == 0) own[id] += __popc(same);
    __syncwarp();
    if (row >= 0) order[row] = int32_t(at + lane);
    if (at + lane < stretch.end) inverse[at + lane] = row;
  }
  for (int i = int(blockIdx.x) * kWarps + warp; i < experts; i += kWarps * int(gridDim.x)) {
    const int end = i + 1 < experts ? starts[i + 1] : in_use;
    for (int row = ends[i] + lane; row < end; row += 32) order[row] = -1;
  }
  for (int64_t row = in_use + int64_t(blockIdx.x) * kThreads + threadIdx.x; row < p.slots;
       row += int64_t(gridDim.x) * kThreads)
    order[row] = -1;
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_moe_align(const MoeAlignParams* params, void* stream) {
  using namespace forebay;
  const MoeAlignParams& p = *params;
  if (p.num_experts <= 0 || p.multiple <= 0 || p.num_blocks <= 0 || p.slots > 0x7fffffff)
    return FOREBAY_INVALID;
  if (p.num_experts > kMaxExperts) return FOREBAY_UNSUPPORTED;
  const size_t shared_bytes = sizeof(int) * kWarps * size_t(p.num_experts);
  const dim3 blocks{unsigned(p.num_blocks)};
  if (p.num_blocks > 1) {
    const int status = launch(&moe_count_kernel, blocks, dim3(kThreads), shared_bytes, stream, p);
    if (status != FOREBAY_OK) return status;
  }
  return launch(&moe_place_kernel, blocks, dim3(kThreads), shared_bytes, stream, p);
}
