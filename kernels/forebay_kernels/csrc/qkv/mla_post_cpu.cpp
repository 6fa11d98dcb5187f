// The CPU's mla_post: a token's cache row, then its query parts head after head.
#include "qkv/rotate.h"

namespace forebay {
namespace {

template <class T, class Cache>
void one_token(const MlaPostParams& p, int64_t token, float inverse) {
  const float* cos = static_cast<const float*>(p.cos) + token * (p.rotated / 2);
  const float* sin = static_cast<const float*>(p.sin) + token * (p.rotated / 2);
  const Rotation rotation{p.rotated, p.interleaved != 0};
  const int64_t slot = static_cast<const int64_t*>(p.slots)[token];
  const int64_t at = row_of_slot(slot, p.num_blocks, p.block_size, p.block_stride, p.slot_stride);
  if (at >= 0) {
    const T* kv = static_cast<const T*>(p.kv) + token * p.kv_stride;
    Cache* row = static_cast<Cache*>(p.cache) + at;
    alignas(64) float line[kMaxWidth];
    norm_head(kv, static_cast<const T*>(p.weight), line, p.latent, p.eps);
    copy_values(line, row, p.latent, inverse);
    rotate_head(kv + p.latent, row + p.latent, cos, sin, p.rotated, rotation, inverse);
  }
  const T* head = static_cast<const T*>(p.q_pe) + token * p.token_stride;
  T* out = static_cast<T*>(p.out) + token * p.num_heads * p.rotated;
  for (int32_t i = 0; i < p.num_heads; ++i, head += p.head_stride, out += p.rotated)
    rotate_head(head, out, cos, sin, p.rotated, rotation, 1.0f);
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_mla_post(const MlaPostParams* params, void*) {
  using namespace forebay;
  const MlaPostParams& p = *params;
  if (p.latent > kMaxWidth) return FOREBAY_UNSUPPORTED;
  const int64_t values = p.latent + (p.num_heads + 1) * int64_t(p.rotated);
  return with_cache_dtype(p.dtype, p.cache_dtype, [&](auto type, auto cache) {
    using T = decltype(type);
    const float inverse = inverse_of(p.scale);
    parallel_for(p.tokens, values * int64_t(sizeof(T)), p.num_threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t token = begin; token < end; ++token)
                     one_token<T, decltype(cache)>(p, token, inverse);
                 });
    return int(FOREBAY_OK);
  });
}
