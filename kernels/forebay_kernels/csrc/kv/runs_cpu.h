// A thread's share of a transfer, taken apart into stretches that lie together in the cache.
#pragma once
#include <algorithm>

#include "kv/layout.h"

namespace forebay::kv {

template <class Params>
int64_t block_id(const Params& p, int64_t index) {
  const int64_t id = p.id_bytes == 4 ? static_cast<const int32_t*>(p.block_table)[index]
                                     : static_cast<const int64_t*>(p.block_table)[index];
  return id >= 0 && id < p.num_blocks ? id : -1;
}

// visit(bytes, rows) for tokens [begin, end), counted [layer][plane][token], in the payload's
// order: `rows` rows one after another at `bytes`, which is null where there is no block.
template <class Params, class Byte, class Visit>
void for_runs(const Params& p, const Layout& layout, Byte* cache, int64_t begin, int64_t end,
              Visit visit) {
  const int64_t size = layout.cache_row_bytes / layout.head_dim;
  const bool heads_joined = p.heads == 1 || p.head_stride == p.head_dim;
  const bool slots_joined = heads_joined && p.slot_stride == p.heads * p.head_dim;
  while (begin < end) {
    const int64_t piece = begin / p.tokens, token = begin % p.tokens;
    const int64_t position = p.token_start + token, slot = position % p.block_size;
    const int64_t count = std::min({end - begin, p.tokens - token, p.block_size - slot});
    const int64_t id = block_id(p, position / p.block_size);
    begin += count;
    if (id < 0) {
      visit(static_cast<Byte*>(nullptr), count * p.heads);
      continue;
    }
    Byte* first =
        cache + size * (piece / p.planes * p.layer_stride + piece % p.planes * p.plane_stride +
                        id * p.block_stride + slot * p.slot_stride);
    if (slots_joined) {
      visit(first, count * p.heads);
      continue;
    }
    for (int64_t i = 0; i < count; ++i, first += size * p.slot_stride) {
      if (heads_joined)
        visit(first, p.heads);
      else
        for (int64_t head = 0; head < p.heads; ++head)
          visit(first + size * head * p.head_stride, int64_t(1));
    }
  }
}

}  // namespace forebay::kv
