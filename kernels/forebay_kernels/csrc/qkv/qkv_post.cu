// Norm per head, rotation and append to the paged cache, after the q, k and v projections.
//
// A few neighbouring threads hold a head, two packs each, and take kHeads heads of one token, so
// that a token's angles are read once for them.
#include "common/launch.cuh"
#include "qkv/head.cuh"

namespace forebay {
namespace {

constexpr int kMaxThreads = 128;
constexpr int64_t kManyThreads = 132 * 1024;  // enough to fill the largest chip

template <class T, class Cache, int kHeads>
__global__ void __launch_bounds__(kMaxThreads, 4) qkv_post_kernel(QkvPostParams p, int units) {
  constexpr int N = kPack<T>;
  const int64_t token = int64_t(blockIdx.x) * blockDim.z + threadIdx.z;
  const int unit = int(blockIdx.y * blockDim.y + threadIdx.y);
  if (token >= p.tokens || unit >= units) return;
  const int lanes = int(blockDim.x);
  const unsigned mask = lanes_mask(lanes);
  const HeadLane<T> lane(int(threadIdx.x), p.head_dim, p.rotated, p.interleaved != 0);
  const int num_rotated = p.num_q_heads + p.num_kv_heads;
  const int num_heads = num_rotated + p.num_kv_heads;

  const T* row = static_cast<const T*>(p.qkv) + token * p.token_stride;
  Pack<T, N> packs[kHeads][2];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = unit + i * units;
    if (head < num_heads) load_head(packs[i], lane, row + head * p.head_stride);
  }
  Angles<T> angles;
  const int64_t angles_at = token * (p.rotated / 2);
  if (unit < num_rotated)
    angles.load(lane, static_cast<const float*>(p.cos) + angles_at,
                static_cast<const float*>(p.sin) + angles_at);
  const int64_t slot = static_cast<const int64_t*>(p.slots)[token];

#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = unit + i * units;
    if (head >= num_heads) break;
    Head<T> values;
    values.unpack(lane, packs[i]);
    if (head < num_rotated) {
      const void* weight = head < p.num_q_heads ? p.q_weight : p.k_weight;
      if (weight != nullptr)
        values.norm(lane, static_cast<const T*>(weight), p.head_dim, p.eps, lanes, mask);
      values.rotate(lane, angles);
    }
    if (head < p.num_q_heads) {
      T* q = static_cast<T*>(p.q) + (token * p.num_q_heads + head) * p.head_dim;
      values.store(lane, q, 1.0f);
      continue;
    }
    const bool key = head < num_rotated;
    const int64_t at =
        row_of_slot(slot, p.num_blocks, p.block_size, key ? p.k_block_stride : p.v_block_stride,
                    key ? p.k_slot_stride : p.v_slot_stride);
    if (at < 0) continue;
    const int kv_head = head - (key ? p.num_q_heads : num_rotated);
    Cache* cache = static_cast<Cache*>(key ? p.k_cache : p.v_cache) + at +
                   kv_head * (key ? p.k_head_stride : p.v_head_stride);
    const float inverse = sizeof(Cache) == 1 ? inverse_of(key ? p.k_scale : p.v_scale) : 1.0f;
    values.store(lane, cache, inverse);
  }
}

template <class T, class Cache, int kHeads>
int start(const QkvPostParams& p, void* stream) {
  const int num_heads = p.num_q_heads + 2 * p.num_kv_heads;
  const int lanes = lanes_for(p.head_dim / kPack<T>);
  const int units = (num_heads + kHeads - 1) / kHeads;
  const int most = kMaxThreads / lanes;
  const int chunks = (units + most - 1) / most;
  const int units_each = (units + chunks - 1) / chunks;
  const int tokens_each = kHeads == 1 ? 1 : most / units_each;
  const int64_t rows = (p.tokens + tokens_each - 1) / tokens_each;
  if (rows > 0x7fffffff) return FOREBAY_UNSUPPORTED;
  return launch(&qkv_post_kernel<T, Cache, kHeads>, dim3(unsigned(rows), unsigned(chunks)),
                dim3(unsigned(lanes), unsigned(units_each), unsigned(tokens_each)), 0, stream, p,
                units);
}

template <class T, class Cache>
int start(const QkvPostParams& p, void* stream) {
  if (!fits_packs<T>(p.head_dim, p.rotated, p.interleaved != 0) || p.head_dim > 64 * kPack<T> ||
      !strides_fit<T>({p.token_stride, p.head_stride, p.k_block_stride, p.k_slot_stride,
                       p.k_head_stride, p.v_block_stride, p.v_slot_stride, p.v_head_stride}))
    return FOREBAY_UNSUPPORTED;
  const int64_t heads = p.tokens * (p.num_q_heads + 2 * p.num_kv_heads);
  const bool many = heads * lanes_for(p.head_dim / kPack<T>) >= 4 * kManyThreads;
  return many ? start<T, Cache, 4>(p, stream) : start<T, Cache, 1>(p, stream);
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_qkv_post(const QkvPostParams* params, void* stream) {
  using namespace forebay;
  const QkvPostParams& p = *params;
  if (p.tokens == 0 || p.head_dim == 0 || p.num_q_heads + p.num_kv_heads == 0) return FOREBAY_OK;
  return with_cache_dtype(p.dtype, p.cache_dtype, [&](auto type, auto cache) {
    return start<decltype(type), decltype(cache)>(p, stream);
  });
}
