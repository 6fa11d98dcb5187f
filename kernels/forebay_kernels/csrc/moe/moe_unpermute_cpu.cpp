// The CPU's moe_unpermute: a stretch of a token's row on the stack, expert after expert.
#include <algorithm>

#include "common/dtypes.cuh"
#include "common/parallel.h"

namespace forebay {
namespace {

constexpr int64_t kStretch = 512;

template <class T>
void unpermute_row(const MoeUnpermuteParams& p, int64_t token) {
  const int32_t* rows = static_cast<const int32_t*>(p.inverse) + token * p.top_k;
  const float* weights = static_cast<const float*>(p.weights) + token * p.top_k;
  T* out = static_cast<T*>(p.out) + token * p.width;
  for (int64_t start = 0; start < p.width; start += kStretch) {
    const int64_t count = std::min(kStretch, p.width - start);
    alignas(64) float sums[kStretch] = {};
    if (p.shared != nullptr) {
      const T* shared = static_cast<const T*>(p.shared) + token * p.shared_stride + start;
      for (int64_t i = 0; i < count; ++i) sums[i] = to_float(shared[i]);
    }
    for (int k = 0; k < p.top_k; ++k) {
      if (rows[k] < 0 || rows[k] >= p.slots) continue;
      const T* y = static_cast<const T*>(p.y) + rows[k] * p.y_stride + start;
      const float weight = weights[k];
      for (int64_t i = 0; i < count; ++i) sums[i] += weight * to_float(y[i]);
    }
    for (int64_t i = 0; i < count; ++i) out[start + i] = from_float<T>(sums[i]);
  }
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_moe_unpermute(const MoeUnpermuteParams* params, void*) {
  using namespace forebay;
  const MoeUnpermuteParams& p = *params;
  if (p.top_k <= 0) return FOREBAY_INVALID;
  return with_float_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(p.tokens, p.width * p.top_k * int64_t(sizeof(T)), p.num_threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t token = begin; token < end; ++token) unpermute_row<T>(p, token);
                 });
    return int(FOREBAY_OK);
  });
}
