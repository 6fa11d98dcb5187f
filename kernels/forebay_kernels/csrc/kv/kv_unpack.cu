// kv_unpack on a GPU: one pass, 16 bytes at a time, a warp on its own (see tiles.cuh).
#include "kv/pairs.cuh"
#include "kv/tiles.cuh"

namespace forebay::kv {
namespace {

__device__ __forceinline__ void unpack_elements(const Plan& plan, const Tile& tile,
                                                const Stage& stage) {
  const auto* from =
      reinterpret_cast<const Access*>(plan.payload + tile.row_of(plan, 0) * plan.row_bytes);
  const int num_accesses = plan.tile_bytes / int(kAccess);
#pragma unroll 1
  for (int base = int(threadIdx.x % 32); base < num_accesses; base += 32 * kInFlight) {
    Access values[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int index = base + 32 * i;
      int row, column;
      locate(plan, index, &row, &column);
      values[i] = make_uint4(0, 0, 0, 0);
      if (index < num_accesses && tile.has(row)) values[i] = __ldcs(from + index);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int index = base + 32 * i;
      if (index >= num_accesses) continue;
      int row, column;
      locate(plan, index, &row, &column);
      reinterpret_cast<Access*>(stage.bytes)[index] = values[i];
      if (stage.places[row] != 0) reinterpret_cast<Access*>(stage.places[row])[column] = values[i];
    }
  }
}

// 16 values to a row of the cache.
template <class T>
__device__ __forceinline__ void decode(Access bits, float scale, uint64_t place) {
  constexpr int kWords = 4 * sizeof(T);
  uint32_t codes[4], words[kWords];
  memcpy(codes, &bits, sizeof(codes));
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const Floats floats = floats_of(codes[i / 2] >> i % 2 * 16);
    const float first = __fmul_rn(floats.first, scale), second = __fmul_rn(floats.second, scale);
    if constexpr (sizeof(T) == 4) {
      words[2 * i] = product_bits(first);
      words[2 * i + 1] = product_bits(second);
    } else {
      words[i] = pair_of<T>(first, second);
    }
  }
#pragma unroll
  for (int i = 0; i < kWords / 4; ++i)
    reinterpret_cast<Access*>(place)[i] =
        make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
}

template <class T>
__device__ __forceinline__ void unpack_codes(const Plan& plan, const Tile& tile,
                                             const Stage& stage) {
  const int num_groups = plan.groups.divisor, num_scales = plan.tile_rows * num_groups;
  const int num_accesses = plan.tile_bytes / int(kAccess), lane = int(threadIdx.x % 32);
  const int64_t first_row = tile.row_of(plan, 0);
  const auto* from = reinterpret_cast<const Access*>(plan.payload + first_row * plan.row_bytes);
  const auto* scales =
      reinterpret_cast<const float*>(plan.payload + plan.row_area) + first_row * num_groups;
  const int missing = int(tile.begin > tile.first ? tile.begin - tile.first : 0) * num_groups;
#pragma unroll 1
  for (int i = lane; i < num_scales; i += 32) stage.scales[i] = i < missing ? 0.0f : scales[i];
  __syncwarp();
#pragma unroll 1
  for (int base = lane; base < num_accesses; base += 32 * kInFlight) {
    Access values[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int index = base + 32 * i;
      int row, column;
      locate(plan, index, &row, &column);
      values[i] = make_uint4(0, 0, 0, 0);
      if (index < num_accesses && tile.has(row)) values[i] = __ldcs(from + index);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int index = base + 32 * i;
      if (index >= num_accesses) continue;
      int row, column;
      locate(plan, index, &row, &column);
      reinterpret_cast<Access*>(stage.bytes)[index] = values[i];
      if (stage.places[row] != 0)
        decode<T>(values[i], stage.scales[row * num_groups + column / 8],
                  stage.places[row] + uint64_t(column) * 16 * sizeof(T));
    }
  }
}

__global__ void __launch_bounds__(kWarps * 32, 2) unpack_elements_kernel(Plan plan) {
  FOREBAY_DYNAMIC_SHARED(shared);
  for_tiles<false>(plan, shared, [&](const Tile& tile, const Stage& stage) {
    unpack_elements(plan, tile, stage);
  });
}

template <class T>
__global__ void __launch_bounds__(kWarps * 32, 2) unpack_codes_kernel(Plan plan) {
  FOREBAY_DYNAMIC_SHARED(shared);
  for_tiles<true>(plan, shared, [&](const Tile& tile, const Stage& stage) {
    unpack_codes<T>(plan, tile, stage);
  });
}

}  // namespace
}  // namespace forebay::kv

extern "C" int forebay_kv_unpack(const KvUnpackParams* params, void* stream) {
  using namespace forebay;
  using namespace forebay::kv;
  const KvUnpackParams& p = *params;
  Plan plan;
  if (!known(p.codec, p.id_bytes) ||
      !make_plan(p, p.cache, p.payload, int64_t(p.max_blocks) * kWarps, &plan))
    return FOREBAY_UNSUPPORTED;
  return with_float_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    return p.codec == FOREBAY_KV_RAW ? start(&unpack_elements_kernel, plan, p.max_blocks, stream)
                                     : start(&unpack_codes_kernel<T>, plan, p.max_blocks, stream);
  });
}
