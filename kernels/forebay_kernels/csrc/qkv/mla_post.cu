// Latent attention after its projections: a warp norms a token's latent, rotates its key part and
// appends both; the others rotate the query parts of its heads.
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "qkv/head.cuh"

namespace forebay {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kHeads = 2;  // of each few threads that hold a head
constexpr int kMaxLatent = 512;
constexpr int64_t kManyTokens = 1024;  // fewer get a block each, to spread over the chip

template <class T, class Cache>
__device__ __forceinline__ void append(const MlaPostParams& p, int64_t token, const float* cos,
                                       const float* sin) {
  constexpr int N = kPack<T>;
  constexpr int kPacks = kMaxLatent / N / 32;
  const T* kv = static_cast<const T*>(p.kv) + token * p.kv_stride;
  Pack<T, N> packs[kPacks], rope_packs[2];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int at = (i * 32 + int(threadIdx.x)) * N;
    if (at < p.latent) packs[i] = *reinterpret_cast<const Pack<T, N>*>(kv + at);
  }
  const HeadLane<T> lane(int(threadIdx.x), p.rotated, p.rotated, p.interleaved != 0);
  load_head(rope_packs, lane, kv + p.latent);
  Angles<T> angles;
  angles.load(lane, cos, sin);
  const int64_t row = row_of_slot(static_cast<const int64_t*>(p.slots)[token], p.num_blocks,
                                  p.block_size, p.block_stride, p.slot_stride);
  if (row < 0) return;

  float values[kPacks][N];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const bool inside = (i * 32 + int(threadIdx.x)) * N < p.latent;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      values[i][j] = inside ? to_float(packs[i].values[j]) : 0.0f;
      squares += values[i][j] * values[i][j];
    }
  }
  const float factor = 1.0f / sqrtf(warp_sum(squares) / float(p.latent) + p.eps);
  const float inverse = sizeof(Cache) == 1 ? inverse_of(p.scale) : 1.0f;
  Cache* out = static_cast<Cache*>(p.cache) + row;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int at = (i * 32 + int(threadIdx.x)) * N;
    if (at >= p.latent) continue;
    const auto weight = *reinterpret_cast<const Pack<T, N>*>(static_cast<const T*>(p.weight) + at);
#pragma unroll
    for (int j = 0; j < N; ++j) values[i][j] *= factor * to_float(weight.values[j]);
    Head<T>::store_pack(values[i], out + at, inverse);
  }
  Head<T> rope;
  rope.unpack(lane, rope_packs);
  rope.rotate(lane, angles);
  rope.store(lane, out + p.latent, inverse);
}

template <class T, class Cache>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    mla_post_kernel(MlaPostParams p, int lanes, int jobs) {
  const int64_t token = int64_t(blockIdx.x) * blockDim.z + threadIdx.z;
  const int job = int(blockIdx.y * blockDim.y + threadIdx.y);
  if (token >= p.tokens || job >= jobs) return;
  const float* cos = static_cast<const float*>(p.cos) + token * (p.rotated / 2);
  const float* sin = static_cast<const float*>(p.sin) + token * (p.rotated / 2);
  if (job == 0) {
    append<T, Cache>(p, token, cos, sin);
    return;
  }
  const int groups = 32 / lanes;
  const int first = ((job - 1) * groups) * kHeads + int(threadIdx.x) / lanes;
  if (first >= p.num_heads) return;
  const HeadLane<T> lane(int(threadIdx.x) % lanes, p.rotated, p.rotated, p.interleaved != 0);
  const T* row = static_cast<const T*>(p.q_pe) + token * p.token_stride;
  Pack<T, kPack<T>> packs[kHeads][2];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = first + i * groups;
    if (head < p.num_heads) load_head(packs[i], lane, row + head * p.head_stride);
  }
  Angles<T> angles;
  angles.load(lane, cos, sin);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = first + i * groups;
    if (head >= p.num_heads) break;
    Head<T> values;
    values.unpack(lane, packs[i]);
    values.rotate(lane, angles);
    T* out = static_cast<T*>(p.out) + (token * p.num_heads + head) * p.rotated;
    values.store(lane, out, 1.0f);
  }
}

template <class T, class Cache>
int start(const MlaPostParams& p, void* stream) {
  constexpr int N = kPack<T>;
  if (p.latent % N != 0 || p.latent > kMaxLatent || p.rotated > 64 * N ||
      !fits_packs<T>(p.rotated, p.rotated, p.interleaved != 0) ||
      !strides_fit<T>({p.kv_stride, p.token_stride, p.head_stride, p.block_stride, p.slot_stride}))
    return FOREBAY_UNSUPPORTED;
  const int lanes = lanes_for(p.rotated / N);
  const int heads_each = 32 / lanes * kHeads;
  const int jobs = 1 + (p.num_heads + heads_each - 1) / heads_each;
  const int chunks = (jobs + kMaxWarps - 1) / kMaxWarps;
  const int jobs_each = (jobs + chunks - 1) / chunks;
  const int tokens_each = p.tokens < kManyTokens ? 1 : kMaxWarps / jobs_each;
  const int64_t rows = (p.tokens + tokens_each - 1) / tokens_each;
  if (rows > 0x7fffffff) return FOREBAY_UNSUPPORTED;
  return launch(&mla_post_kernel<T, Cache>, dim3(unsigned(rows), unsigned(chunks)),
                dim3(32, unsigned(jobs_each), unsigned(tokens_each)), 0, stream, p, lanes, jobs);
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_mla_post(const MlaPostParams* params, void* stream) {
  using namespace forebay;
  const MlaPostParams& p = *params;
  if (p.tokens == 0) return FOREBAY_OK;
  return with_cache_dtype(p.dtype, p.cache_dtype, [&](auto type, auto cache) {
    return start<decltype(type), decltype(cache)>(p, stream);
  });
}
