// The CPU's moe_permute: a copy a row.
#include <cstring>

#include "common/parallel.h"
#include "params.h"

extern "C" int forebay_moe_permute(const MoePermuteParams* params, void*) {
  using namespace forebay;
  const MoePermuteParams& p = *params;
  if (p.slots == 0 || p.row_bytes == 0) return FOREBAY_OK;
  if (p.top_k <= 0) return FOREBAY_INVALID;
  const int32_t* order = static_cast<const int32_t*>(p.order);
  const unsigned char* x = static_cast<const unsigned char*>(p.x);
  unsigned char* out = static_cast<unsigned char*>(p.out);
  parallel_for(p.slots, p.row_bytes, p.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = order[row] / p.top_k;
      unsigned char* to = out + row * p.row_bytes;
      if (order[row] >= 0 && token < p.tokens)
        std::memcpy(to, x + token * p.x_stride_bytes, size_t(p.row_bytes));
      else
        std::memset(to, 0, size_t(p.row_bytes));
    }
  });
  return FOREBAY_OK;
}
