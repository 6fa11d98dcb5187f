// Rows of a paged cache, for GPU and CPU.
#pragma once
#include "common/dtypes.cuh"

namespace forebay {

// Where a slot's row begins in a cache; negative where there is no such slot.
FOREBAY_DEVICE int64_t row_of_slot(int64_t slot, int64_t num_blocks, int64_t block_size,
                                   int64_t block_stride, int64_t slot_stride) {
  const int64_t num_slots = num_blocks * block_size;
  if (slot < 0 || slot >= num_slots) return -1;
  int64_t block;
  if (num_slots <= 0xffffffffll)
    block = uint32_t(slot) / uint32_t(block_size);
  else
    block = slot / block_size;
  return block * block_stride + (slot - block * block_size) * slot_stride;
}

// What values are multiplied by before they become e4m3.
FOREBAY_DEVICE float inverse_of(const void* scale) {
  return scale == nullptr ? 1.0f : 1.0f / *static_cast<const float*>(scale);
}

// visit(T{}, C{}) for the types of the tensors and of the cache.
template <class Visitor>
int with_cache_dtype(int32_t dtype, int32_t cache_dtype, Visitor visit) {
  return with_float_dtype(dtype, [&](auto type) {
    if (cache_dtype == dtype) return visit(type, type);
    if (cache_dtype == FOREBAY_E4M3) return visit(type, e4m3{});
    return int(FOREBAY_UNSUPPORTED);
  });
}

}  // namespace forebay
