// What kv_pack and kv_unpack share: a warp goes through ranges of rows tile by tile, stages a
// tile's bytes of the payload in shared memory and checks them from there. Warps need nothing of
// each other.
#pragma once
#include <type_traits>

#include "kv/plan.h"
#include "kv/warp_checksum.cuh"

namespace forebay::kv {

using Access = uint4;
static_assert(sizeof(Access) == kAccess);

constexpr int kInFlight = 4;  // accesses of a lane

// A warp's part of the block's shared memory.
struct Stage {
  unsigned char* bytes;  // of a tile's rows
  uint64_t* places;      // kTileRows: where each row is in the cache, 0: nowhere
  float* scales;         // of a tile's rows

  __device__ __forceinline__ Stage(const Plan& plan, unsigned char* shared) {
    bytes = shared + threadIdx.x / 32 * unsigned(plan.warp_bytes());
    places = reinterpret_cast<uint64_t*>(bytes + plan.tile_bytes);
    scales = reinterpret_cast<float*>(places + kTileRows);
  }
};

// Rows [first, first + tile_rows) of a piece, those before `begin` missing.
struct Tile {
  int64_t first, begin;
  uint32_t piece;
  uint64_t place;  // of the piece in the cache

  __device__ __forceinline__ bool has(int row) const { return first + row >= begin; }
  // Of a row of the tile, among the rows of the payload.
  __device__ __forceinline__ int64_t row_of(const Plan& plan, int row) const {
    return int64_t(piece) * plan.piece_rows + first + row;
  }
};

// A lane a row.
__device__ __forceinline__ void find_places(const Plan& plan, const Tile& tile,
                                            const Stage& stage) {
  const int lane = int(threadIdx.x % 32);
  if (lane >= plan.tile_rows) return;
  uint64_t place = 0;
  if (tile.has(lane)) {
    const uint32_t row = uint32_t(tile.first + lane);
    const uint32_t token = plan.heads.quotient(row), head = row - token * plan.heads.divisor;
    const uint32_t position = uint32_t(plan.token_start) + token;
    const uint32_t index = plan.block_size.quotient(position);
    const uint32_t slot = position - index * plan.block_size.divisor;
    const int64_t id = plan.wide_ids ? static_cast<const int64_t*>(plan.block_table)[index]
                                     : static_cast<const int32_t*>(plan.block_table)[index];
    if (id >= 0 && id < plan.num_blocks)
      place = tile.place +
              uint64_t(id * plan.block_bytes + slot * plan.slot_bytes + head * plan.head_bytes);
  }
  stage.places[lane] = place;
}

// The register of the scales, which come scale_rows rows at a time, lowest lanes left out.
class ScaleChecksum {
 public:
  __device__ __forceinline__ explicit ScaleChecksum(const Plan& plan) : next_(plan.scale_factor) {}

  __device__ __forceinline__ void add(const Plan& plan, const float* scales) {
    const int width = plan.scale_rows * plan.groups.divisor;
    const int at = int(threadIdx.x % 32) - (32 - width);
    for (int row = 0; row < plan.tile_rows; row += plan.scale_rows) {
      value_ = next_(value_);
      if (at >= 0) value_ ^= float_bits(scales[row * plan.groups.divisor + at]);
    }
  }
  __device__ __forceinline__ uint32_t finish() const { return sum_of_lanes(value_); }

 private:
  Multiplier next_;
  uint32_t value_ = 0;
};
struct NoChecksum {
  __device__ __forceinline__ explicit NoChecksum(const Plan&) {}
};

// move(tile, stage) for every tile of the warp's ranges: it leaves the tile's bytes of the payload,
// zeros for missing rows, in stage.bytes and, with the codec, stage.scales.
template <bool kCodec, class Move>
__device__ __forceinline__ void for_tiles(const Plan& plan, unsigned char* shared, Move move) {
  using Scales = std::conditional_t<kCodec, ScaleChecksum, NoChecksum>;
  const Stage stage(plan, shared);
  const uint32_t lane = threadIdx.x % 32;
  const uint64_t num_ranges = uint64_t(plan.pieces) * plan.ranges;
  const uint64_t num_warps = uint64_t(gridDim.x) * kWarps;
  for (uint64_t i = uint64_t(blockIdx.x) * kWarps + threadIdx.x / 32; i < num_ranges;
       i += num_warps) {
    const uint32_t piece = uint32_t(i / plan.ranges);
    const uint64_t place = reinterpret_cast<uint64_t>(plan.cache) +
                           uint64_t(int64_t(piece / uint32_t(plan.planes)) * plan.layer_bytes +
                                    int64_t(piece % uint32_t(plan.planes)) * plan.plane_bytes);
    const int64_t end = plan.piece_rows - int64_t(i % plan.ranges) * plan.range_rows;
    const int64_t begin = end > plan.range_rows ? end - plan.range_rows : 0;
    const int num_tiles = int((end - begin + plan.tile_rows - 1) / plan.tile_rows);
    WarpChecksum rows;
    Scales scales(plan);
#pragma unroll 1
    for (int left = num_tiles; left > 0; --left) {
      const Tile tile{end - int64_t(left) * plan.tile_rows, begin, piece, place};
      __syncwarp();
      find_places(plan, tile, stage);
      __syncwarp();
      move(tile, stage);
      __syncwarp();
#pragma unroll 1
      for (int at = 0; at < plan.tile_bytes; at += kStepBytes) rows.add(stage.bytes + at);
      if constexpr (kCodec) scales.add(plan, stage.scales);
    }
    const int64_t rows_before = int64_t(piece) * plan.piece_rows + end;
    const int64_t rows_end = rows_before * plan.row_bytes;
    uint32_t value = followed_by(rows.finish(), uint64_t(plan.payload_bytes - rows_end));
    if constexpr (kCodec) {
      const int64_t scales_end =
          plan.row_area + rows_before * plan.groups.divisor * int64_t(sizeof(float));
      value ^= followed_by(scales.finish(), uint64_t(plan.payload_bytes - scales_end));
    }
    if (i == 0) value ^= plan.ends;
    if (lane == 0) atomicXor(plan.crc, value);
  }
}

// The row of a tile and, in accesses, the place within it of the tile's `index`th access.
__device__ __forceinline__ void locate(const Plan& plan, int index, int* row, int* column) {
  *row = plan.vectors.quotient(index);
  *column = index - *row * plan.vectors.divisor;
}

template <class Kernel>
int start(Kernel kernel, const Plan& plan, int64_t max_blocks, void* stream) {
  const int64_t ranges = int64_t(plan.pieces) * plan.ranges;
  const int64_t blocks = std::min((ranges + kWarps - 1) / kWarps, max_blocks);
  return launch(kernel, dim3(unsigned(blocks)), dim3(kWarps * 32),
                size_t(kWarps) * size_t(plan.warp_bytes()), stream, plan);
}

}  // namespace forebay::kv
