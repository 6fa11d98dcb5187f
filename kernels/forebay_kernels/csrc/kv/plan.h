// How a GPU shares out a transfer: ranges of rows to warps, tiles of a range one after another.
#pragma once
#include <algorithm>

#include "kv/layout.h"

namespace forebay::kv {

// Quotients of numbers below 2^31 by multiplication.
struct Divider {
  uint32_t divisor, factor;
  int32_t shift;

  Divider() = default;
  explicit Divider(int64_t by) : divisor(uint32_t(by)), shift(31) {
    while ((int64_t(1) << (shift - 31)) < by) ++shift;
    factor = uint32_t(((uint64_t(1) << shift) + uint64_t(by) - 1) / uint64_t(by));
  }
  FOREBAY_DEVICE uint32_t quotient(uint32_t number) const {
    return uint32_t(uint64_t(number) * factor >> shift);
  }
};

// The same for numbers below 2048 and divisors to 512.
struct SmallDivider {
  int32_t divisor, factor;

  SmallDivider() = default;
  explicit SmallDivider(int64_t by)
      : divisor(int32_t(by)), factor(int32_t(((1 << 20) + by - 1) / by)) {}
  FOREBAY_DEVICE int quotient(int number) const { return int(unsigned(number * factor) >> 20); }
};

constexpr int kWarps = 8;  // of a thread block
constexpr int64_t kTileBytes = 2048;
constexpr int64_t kMaxTileBytes = 8192;
constexpr int64_t kTileRows = 32;  // at most: a lane finds each row's place
constexpr int64_t kMinTiles = 4;   // of a range, to be worth its end
constexpr int64_t kAccess = 16;    // bytes

// Ranges are counted from the end of their piece, and tiles from the end of their range, so that
// all but the first of each have the same size: what is missing there counts as zeros, which a
// checksum does not see.
struct Plan {
  const uint8_t* cache;  // written by kv_unpack alone
  const void* block_table;
  const uint8_t* payload;  // written by kv_pack alone
  uint32_t* crc;
  int64_t layer_bytes, plane_bytes, block_bytes, slot_bytes, head_bytes;  // strides
  int64_t num_blocks, token_start, planes;
  int64_t row_area, payload_bytes;
  Divider heads, block_size;
  SmallDivider vectors, groups;                     // of a row of the payload; vectors: 16 bytes
  uint32_t pieces, piece_rows, ranges, range_rows;  // ranges of a piece
  int32_t row_bytes, head_dim, tile_rows, tile_bytes;
  int32_t scale_rows;     // whose scales are added to their checksum at once
  uint32_t scale_factor;  // x^(8 * bytes of these scales)
  uint32_t ends;
  bool wide_ids;

  FOREBAY_DEVICE int32_t warp_bytes() const {
    return tile_bytes + int32_t(kTileRows) * 8 + scale_bytes();
  }
  FOREBAY_DEVICE int32_t scale_bytes() const {
    return (tile_rows * groups.divisor * 4 + int32_t(kAccess) - 1) / int32_t(kAccess) *
           int32_t(kAccess);
  }
};

// False where kernels cannot go: rows or strides that are no multiples of 16 bytes, rows too wide.
template <class Params>
bool make_plan(const Params& p, const void* cache, const void* payload, int64_t max_warps,
               Plan* plan) {
  const Layout layout(p);
  const int64_t size = layout.cache_row_bytes / layout.head_dim;
  const int64_t strides[] = {p.layer_stride, p.plane_stride, p.block_stride, p.slot_stride,
                             p.head_stride};
  for (int64_t stride : strides)
    if (stride * size % kAccess != 0) return false;
  if (layout.row_bytes % kAccess != 0 || reinterpret_cast<uintptr_t>(cache) % kAccess != 0 ||
      reinterpret_cast<uintptr_t>(payload) % kAccess != 0)
    return false;
  int64_t tile_rows = 1;
  while (tile_rows * layout.row_bytes % 512 != 0) tile_rows *= 2;
  if (tile_rows * layout.row_bytes > kMaxTileBytes || layout.groups > 32) return false;
  while (2 * tile_rows <= kTileRows && 2 * tile_rows * layout.row_bytes <= kTileBytes)
    tile_rows *= 2;
  const int64_t limit = int64_t(1) << 31;
  if (layout.piece_rows >= limit || p.token_start + p.tokens >= limit || layout.pieces >= limit ||
      p.block_size >= limit)
    return false;

  // A wave of ranges, one a warp; where pieces are many for that, several waves.
  const int64_t tiles = (layout.piece_rows + tile_rows - 1) / tile_rows;
  int64_t ranges = max_warps / layout.pieces;
  if (ranges < 8) ranges = (4 * max_warps + layout.pieces - 1) / layout.pieces;
  ranges = std::max<int64_t>(1, std::min(ranges, tiles / kMinTiles));
  const int64_t range_tiles = (tiles + ranges - 1) / ranges;
  ranges = (tiles + range_tiles - 1) / range_tiles;

  int64_t scale_rows = tile_rows;
  while (scale_rows * layout.groups > 32) scale_rows /= 2;
  *plan = Plan{};
  plan->cache = static_cast<const uint8_t*>(cache);
  plan->block_table = p.block_table;
  plan->payload = static_cast<const uint8_t*>(payload);
  plan->crc = static_cast<uint32_t*>(p.crc);
  plan->layer_bytes = p.layer_stride * size;
  plan->plane_bytes = p.plane_stride * size;
  plan->block_bytes = p.block_stride * size;
  plan->slot_bytes = p.slot_stride * size;
  plan->head_bytes = p.head_stride * size;
  plan->num_blocks = p.num_blocks;
  plan->token_start = p.token_start;
  plan->planes = p.planes;
  plan->row_area = layout.row_area();
  plan->payload_bytes = layout.bytes();
  plan->heads = Divider(layout.heads);
  plan->block_size = Divider(p.block_size);
  plan->vectors = SmallDivider(layout.row_bytes / kAccess);
  plan->groups = SmallDivider(std::max<int64_t>(1, layout.groups));
  plan->pieces = uint32_t(layout.pieces);
  plan->piece_rows = uint32_t(layout.piece_rows);
  plan->ranges = uint32_t(ranges);
  plan->range_rows = uint32_t(range_tiles * tile_rows);
  plan->row_bytes = int32_t(layout.row_bytes);
  plan->head_dim = int32_t(layout.head_dim);
  plan->tile_rows = int32_t(tile_rows);
  plan->tile_bytes = int32_t(tile_rows * layout.row_bytes);
  plan->scale_rows = int32_t(scale_rows);
  plan->scale_factor = power_of_x(uint64_t(8 * scale_rows * layout.scale_bytes()));
  plan->ends = ends(uint64_t(layout.bytes()));
  plan->wide_ids = p.id_bytes == 8;
  return true;
}

}  // namespace forebay::kv
