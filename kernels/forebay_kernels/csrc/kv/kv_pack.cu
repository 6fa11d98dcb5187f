// kv_pack on a GPU: one pass, 16 bytes at a time, a warp on its own (see tiles.cuh).
#include "kv/pairs.cuh"
#include "kv/tiles.cuh"

namespace forebay::kv {
namespace {

__device__ __forceinline__ void pack_elements(const Plan& plan, const Tile& tile,
                                              const Stage& stage) {
  auto* out = reinterpret_cast<Access*>(const_cast<uint8_t*>(plan.payload) +
                                        tile.row_of(plan, 0) * plan.row_bytes);
  const int num_accesses = plan.tile_bytes / int(kAccess);
#pragma unroll 1
  for (int base = int(threadIdx.x % 32); base < num_accesses; base += 32 * kInFlight) {
    Access values[kInFlight];
    bool there[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int index = base + 32 * i;
      int row, column;
      locate(plan, index, &row, &column);
      values[i] = make_uint4(0, 0, 0, 0);
      there[i] = index < num_accesses && tile.has(row);
      if (there[i] && stage.places[row] != 0)
        values[i] = __ldcs(reinterpret_cast<const Access*>(stage.places[row]) + column);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int index = base + 32 * i;
      if (there[i]) __stcs(out + index, values[i]);
      if (index < num_accesses) reinterpret_cast<Access*>(stage.bytes)[index] = values[i];
    }
  }
}

// 16 values of a row of the cache, in pairs where they are that short.
template <class T>
struct Values {
  static constexpr int kWords = 4 * sizeof(T);
  uint32_t words[kWords] = {};

  __device__ __forceinline__ void load(uint64_t place) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const Access access = __ldcs(reinterpret_cast<const Access*>(place) + i);
      memcpy(words + 4 * i, &access, sizeof(access));
    }
  }
  // The largest magnitude: as integers they order too, with infinities and NaN above.
  __device__ __forceinline__ float largest() const {
    uint32_t out = 0;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint32_t magnitude = words[i] & 0x7fffffffu;
        out = magnitude > out ? magnitude : out;
      }
      return float_of(out);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) out = larger_halves(out, words[i] & 0x7fff7fffu);
      return first_of<T>(larger_halves(out, out >> 16));
    }
  }
  __device__ __forceinline__ Access codes(float inverse) const {
    Access out;
    uint32_t parts[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) parts[i] = pair(2 * i, inverse) | pair(2 * i + 1, inverse) << 16;
    memcpy(&out, parts, sizeof(out));
    return out;
  }

 private:
  __device__ __forceinline__ uint32_t pair(int i, float inverse) const {
    if constexpr (sizeof(T) == 4)
      return codes_of(__fmul_rn(float_of(words[2 * i]), inverse),
                      __fmul_rn(float_of(words[2 * i + 1]), inverse));
    else
      return codes_of(__fmul_rn(first_of<T>(words[i]), inverse),
                      __fmul_rn(second_of<T>(words[i]), inverse));
  }
};

// One half of fp8_scale: a group's lanes share the divisions of all groups under way.
__device__ __forceinline__ float fp8_ratio(float largest, bool inverse) {
  const bool finite = largest < float_of(0x7f800000);
  const float floor = float_of((127u - 110u) << 23);
  const float counted = largest > floor ? largest : floor;
  const float ratio = __fdiv_rn(inverse ? 448.0f : counted, inverse ? counted : 448.0f);
  return finite ? ratio : inverse ? 0.0f : float_of(0x7fc00000);
}

// A group has 8 lanes, or 4 where rows are that short, with 16 values each.
template <class T>
__device__ __forceinline__ void pack_codes(const Plan& plan, const Tile& tile, const Stage& stage) {
  constexpr int kAtOnce = sizeof(T) == 4 ? 1 : 2;
  const int group_lanes = plan.head_dim <= 64 ? 4 : 8, groups_at_once = 32 / group_lanes;
  const int num_groups = plan.groups.divisor, num_items = plan.tile_rows * num_groups;
  const int lane = int(threadIdx.x % 32), part = lane % group_lanes;
  const int64_t first_row = tile.row_of(plan, 0);
  auto* out = const_cast<uint8_t*>(plan.payload) + first_row * plan.row_bytes;
#pragma unroll 1
  for (int first = 0; first < num_items; first += kAtOnce * groups_at_once) {
    const int base = first + lane / group_lanes;
    Values<T> values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int item = base + i * groups_at_once;
      const int row = plan.groups.quotient(item);
      const int column = (item - row * num_groups) * int(kGroup) + part * 16;
      values[i] = Values<T>{};
      if (item < num_items && column < plan.head_dim && stage.places[row] != 0)
        values[i].load(stage.places[row] + uint64_t(column) * sizeof(T));
    }
    uint32_t largest[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      largest[i] = float_bits(values[i].largest());
#pragma unroll
      for (int lanes = 4; lanes > 0; lanes /= 2) {
        const uint32_t other = __shfl_xor_sync(kAllLanes, largest[i], lanes);
        if (lanes < group_lanes && other > largest[i]) largest[i] = other;
      }
    }
    const uint32_t of_mine = part % 2 == 0 ? largest[0] : largest[kAtOnce - 1];
    const float mine = fp8_ratio(float_of(of_mine), part / 2 % 2 == 0);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int item = base + i * groups_at_once;
      const int row = plan.groups.quotient(item);
      const int column = (item - row * num_groups) * int(kGroup) + part * 16;
      const float inverse = __shfl_sync(kAllLanes, mine, lane - part + i);
      if (item >= num_items) continue;
      if (part == 2 + i) stage.scales[item] = tile.has(row) ? mine : 0.0f;
      if (column >= plan.head_dim) continue;
      Access codes = values[i].codes(inverse);
      if (!(inverse > 0.0f)) codes = make_uint4(0, 0, 0, 0);  // of a group that is not finite
      const int at = row * plan.row_bytes + column;
      if (tile.has(row)) __stcs(reinterpret_cast<Access*>(out + at), codes);
      *reinterpret_cast<Access*>(stage.bytes + at) = codes;
    }
  }
  __syncwarp();
  auto* out_scales = reinterpret_cast<float*>(const_cast<uint8_t*>(plan.payload) + plan.row_area) +
                     first_row * num_groups;
  const int missing = int(tile.begin > tile.first ? tile.begin - tile.first : 0) * num_groups;
#pragma unroll 1
  for (int i = missing + lane; i < num_items; i += 32) out_scales[i] = stage.scales[i];
}

__global__ void __launch_bounds__(kWarps * 32, 2) pack_elements_kernel(Plan plan) {
  FOREBAY_DYNAMIC_SHARED(shared);
  for_tiles<false>(plan, shared,
                   [&](const Tile& tile, const Stage& stage) { pack_elements(plan, tile, stage); });
}

template <class T>
__global__ void __launch_bounds__(kWarps * 32, 2) pack_codes_kernel(Plan plan) {
  FOREBAY_DYNAMIC_SHARED(shared);
  for_tiles<true>(plan, shared,
                  [&](const Tile& tile, const Stage& stage) { pack_codes<T>(plan, tile, stage); });
}

}  // namespace
}  // namespace forebay::kv

extern "C" int forebay_kv_pack(const KvPackParams* params, void* stream) {
  using namespace forebay;
  using namespace forebay::kv;
  const KvPackParams& p = *params;
  Plan plan;
  if (!known(p.codec, p.id_bytes) ||
      !make_plan(p, p.cache, p.out, int64_t(p.max_blocks) * kWarps, &plan))
    return FOREBAY_UNSUPPORTED;
  return with_float_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    return p.codec == FOREBAY_KV_RAW ? start(&pack_elements_kernel, plan, p.max_blocks, stream)
                                     : start(&pack_codes_kernel<T>, plan, p.max_blocks, stream);
  });
}
