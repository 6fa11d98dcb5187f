// CRC-32C of what a warp moves, by logic operations alone: no tables, no carry-less multiplication.
//
// With y = x^1024, squaring being linear, P(y) = P(x)^1024 = 0: the polynomial that reduces bits
// also reduces rows of 1024 bits. So the warp looks at its bytes as rows of 32 words, a word a
// lane, and each lane divides its column by P(y), bitwise over whole words: a shift register of 32
// words with the taps of P. The taps are sparse at the top, so four rows go in one step of 45
// three-input operations: 11 a word, where tables would take 4 to 8 look-ups in shared memory and
// their bank conflicts. An H200 that copies at 4.3 TB/s moves 2.2 words a clock on each
// multiprocessor: 25 of its 64 logic lanes. What is left at the end, 32 words a lane, is summed up
// with multiplications by constants; 1,300 instructions or so, once per warp and range.
#pragma once
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "kv/checksum.h"

namespace forebay::kv {

constexpr int kRowBytes = 128;
constexpr int kStepRows = 4;
constexpr int kStepBytes = kRowBytes * kStepRows;  // a 16-byte access of every lane

struct LaneConstants {
  uint32_t place[32];  // x^(32 * (32 - lane)): of a lane's word in a row, and x^32 for the register
  uint32_t above[32];  // x^(32 + lane): what a product's bits beyond a register stand for
  uint32_t square[32];  // x^(2^lane)

  constexpr LaneConstants() : place(), above(), square() {
    for (int i = 0; i < 32; ++i) {
      place[i] = power_of_x(uint64_t(32 * (32 - i)));
      above[i] = power_of_x(uint64_t(32 + i));
      square[i] = i == 0 ? kX : times(square[i - 1], square[i - 1]);
    }
  }
};
__device__ const LaneConstants kLanes;

// Multiplies by a constant: five bits of a factor choose one of 32 sums of the constant's
// multiples, which the lanes hold. All lanes call.
class Multiplier {
 public:
  __device__ __forceinline__ explicit Multiplier(uint32_t constant) {
    const unsigned lane = threadIdx.x % 32;
    uint32_t multiple = constant;  // of bit 31, the coefficient of x^0; then of the bits below
#pragma unroll
    for (int chunk = kChunks - 1; chunk >= 0; --chunk) {
      sums_[chunk] = 0;
#pragma unroll
      for (int bit = chunk == kChunks - 1 ? 1 : 4; bit >= 0; --bit) {
        sums_[chunk] ^= multiple & (0u - (lane >> bit & 1));
        multiple = times_x(multiple);
      }
    }
  }

  __device__ __forceinline__ uint32_t operator()(uint32_t factor) const {
    uint32_t out = 0;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk)
      out ^= __shfl_sync(kAllLanes, sums_[chunk], int(factor >> 5 * chunk & 31));
    return out;
  }

 private:
  static constexpr int kChunks = 7;
  uint32_t sums_[kChunks];
};

// a * b, the same in all lanes.
__device__ __forceinline__ uint32_t warp_times(uint32_t a, uint32_t b) {
  const unsigned lane = threadIdx.x % 32;
  const uint32_t chosen = 0u - (a >> (31 - lane) & 1);
  const uint64_t product = (uint64_t(b) << 32) >> lane & (uint64_t(chosen) << 32 | chosen);
  const uint32_t low = __reduce_xor_sync(kAllLanes, uint32_t(product >> 32));
  const uint32_t beyond = __reduce_xor_sync(kAllLanes, uint32_t(product));
  return low ^
         __reduce_xor_sync(kAllLanes, kLanes.above[lane] & (0u - (beyond >> (31 - lane) & 1)));
}

// The register of a message followed by `bytes` more.
__device__ __forceinline__ uint32_t followed_by(uint32_t value, uint64_t bytes) {
  // x^(2^31 - 1) = 1, for P is x + 1 times a primitive polynomial of degree 31.
  unsigned exponent = unsigned(8 * bytes % 0x7fffffffu);
  const uint32_t square = kLanes.square[threadIdx.x % 32];
  for (; exponent != 0; exponent &= exponent - 1)
    value = warp_times(value, __shfl_sync(kAllLanes, square, __ffs(int(exponent)) - 1));
  return value;
}

// The register of a row that has a word in each lane.
__device__ __forceinline__ uint32_t sum_of_lanes(uint32_t value) {
  return __reduce_xor_sync(kAllLanes, times(value, kLanes.place[threadIdx.x % 32]));
}

class WarpChecksum {
 public:
  __device__ __forceinline__ WarpChecksum() {
#pragma unroll
    for (int i = 0; i < 32; ++i) words_[i] = 0;
  }

  // The next kStepBytes, which lie in shared memory. All lanes call.
  __device__ __forceinline__ void add(const unsigned char* bytes) {
    const auto* rows = reinterpret_cast<const uint32_t*>(bytes) + threadIdx.x % 32;
    uint32_t out[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      out[i] = i >= kStepRows ? words_[i - kStepRows] : rows[(kStepRows - 1 - i) * (kRowBytes / 4)];
#pragma unroll
      for (int j = 0; j < kStepRows; ++j)
        if (i >= j && (kTaps >> (i - j) & 1)) out[i] ^= words_[32 - kStepRows + j];
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) words_[i] = out[i];
  }

  // The same in all lanes, and all of them call.
  __device__ __forceinline__ uint32_t finish() const {
    const Multiplier times_row(kRow);
    uint32_t value = 0;
#pragma unroll
    for (int i = 31; i >= 0; --i) value = times_row(value) ^ words_[i];
    return sum_of_lanes(value);
  }

 private:
  static constexpr uint32_t kTaps = 0x1edc6f41u;  // bit i: x^i; none between x^28 and x^32
  static constexpr uint32_t kRow = power_of_x(8 * kRowBytes);
  uint32_t words_[32];  // i: coefficient of y^i
};

}  // namespace forebay::kv
