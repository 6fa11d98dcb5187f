// The CPU's qkv_post: head after head of a token.
#include "qkv/rotate.h"

namespace forebay {
namespace {

template <class T, class Out>
void rotated_head(const QkvPostParams& p, int64_t token, const T* head, const void* weight,
                  Out* out, float inverse) {
  const int64_t angles_at = token * (p.rotated / 2);
  const float* cos = static_cast<const float*>(p.cos) + angles_at;
  const float* sin = static_cast<const float*>(p.sin) + angles_at;
  const Rotation rotation{p.rotated, p.interleaved != 0};
  if (weight == nullptr) {
    rotate_head(head, out, cos, sin, p.head_dim, rotation, inverse);
    return;
  }
  alignas(64) float line[kMaxWidth];
  norm_head(head, static_cast<const T*>(weight), line, p.head_dim, p.eps);
  rotate_head(line, out, cos, sin, p.head_dim, rotation, inverse);
}

template <class T, class Cache>
void one_token(const QkvPostParams& p, int64_t token, float k_inverse, float v_inverse) {
  const T* head = static_cast<const T*>(p.qkv) + token * p.token_stride;
  T* q = static_cast<T*>(p.q) + token * p.num_q_heads * p.head_dim;
  for (int32_t i = 0; i < p.num_q_heads; ++i, head += p.head_stride, q += p.head_dim)
    rotated_head(p, token, head, p.q_weight, q, 1.0f);
  const int64_t slot = static_cast<const int64_t*>(p.slots)[token];
  const int64_t k_at =
      row_of_slot(slot, p.num_blocks, p.block_size, p.k_block_stride, p.k_slot_stride);
  const int64_t v_at =
      row_of_slot(slot, p.num_blocks, p.block_size, p.v_block_stride, p.v_slot_stride);
  if (k_at < 0) return;
  Cache* k = static_cast<Cache*>(p.k_cache) + k_at;
  for (int32_t i = 0; i < p.num_kv_heads; ++i, head += p.head_stride, k += p.k_head_stride)
    rotated_head(p, token, head, p.k_weight, k, k_inverse);
  Cache* v = static_cast<Cache*>(p.v_cache) + v_at;
  for (int32_t i = 0; i < p.num_kv_heads; ++i, head += p.head_stride, v += p.v_head_stride)
    copy_values(head, v, p.head_dim, v_inverse);
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_qkv_post(const QkvPostParams* params, void*) {
  using namespace forebay;
  const QkvPostParams& p = *params;
  if (p.head_dim > kMaxWidth) return FOREBAY_UNSUPPORTED;
  const int64_t num_heads = p.num_q_heads + 2 * p.num_kv_heads;
  return with_cache_dtype(p.dtype, p.cache_dtype, [&](auto type, auto cache) {
    using T = decltype(type);
    const float k_inverse = inverse_of(p.k_scale), v_inverse = inverse_of(p.v_scale);
    parallel_for(p.tokens, num_heads * p.head_dim * int64_t(sizeof(T)), p.num_threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t token = begin; token < end; ++token)
                     one_token<T, decltype(cache)>(p, token, k_inverse, v_inverse);
                 });
    return int(FOREBAY_OK);
  });
}
