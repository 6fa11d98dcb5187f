// How rows are laid over blocks: 32 to 256 lanes a row, so many rows a block that it is full, and
// several blocks a row where one does not reach its end.
#pragma once
#include "common/dtypes.cuh"
#include "common/launch.cuh"

namespace forebay {

constexpr int kTileThreads = 256;

// packs_each: accesses of a thread, one lanes() after another.
struct Tiling {
  uint32_t log_lanes;
  uint32_t tiles;  // blocks a row
  int64_t blocks;

  Tiling(int64_t rows, int64_t packs, int packs_each) : log_lanes(5) {
    while (lanes() < kTileThreads && int64_t(lanes()) * packs_each < packs) ++log_lanes;
    const int64_t tile = int64_t(lanes()) * packs_each, rows_each = kTileThreads / lanes();
    const int64_t wanted = (packs + tile - 1) / tile;
    tiles = uint32_t(wanted);
    blocks = wanted * ((rows + rows_each - 1) / rows_each);
  }
  bool fits() const { return blocks <= 0x7fffffff; }
  FOREBAY_DEVICE uint32_t lanes() const { return 1u << log_lanes; }
};

// The thread's row (the same for a whole warp) and its first pack in it; either may be past the
// end.
struct Place {
  int64_t row, pack;

  __device__ __forceinline__ Place(const Tiling& tiling, int packs_each) {
    const uint32_t rows = blockIdx.x / tiling.tiles, tile = blockIdx.x - rows * tiling.tiles;
    const uint32_t thread = threadIdx.x, lane = thread & (tiling.lanes() - 1);
    row = int64_t(rows) * (kTileThreads >> tiling.log_lanes) + (thread >> tiling.log_lanes);
    pack = (int64_t(tile) * packs_each << tiling.log_lanes) + lane;
  }
};

}  // namespace forebay
