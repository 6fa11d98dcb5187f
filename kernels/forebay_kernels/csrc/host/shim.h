// CUDA's language for g++: the same .cu file runs on a CPU, one fiber a thread, block after block.
//
// What it is for: comparing kernels with references where there is no GPU, under the address
// sanitizer and under several orders of threads. A block runs until every thread has ended; a
// barrier that not every thread reaches ends the launch with FOREBAY_INVALID, and so does a warp
// operation whose lanes do not all arrive. What it cannot show: races inside a warp between
// barriers, memory ordering, speed.
#pragma once
#include <math.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "params.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __align__(n) alignas(n)
#define __constant__ static const

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};

#define FOREBAY_VECTOR(type, name, bytes)                          \
  struct alignas(bytes) name##2 { type x, y; };                    \
  struct alignas(2 * bytes) name##4 { type x, y, z, w; };          \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
FOREBAY_VECTOR(float, float, 8)
FOREBAY_VECTOR(int, int, 8)
FOREBAY_VECTOR(unsigned, uint, 8)
#undef FOREBAY_VECTOR

namespace forebay::host {

// Where the running fiber is.
struct Position {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Position position;

// Runs `body` once for every thread of every block. Not reentrant, one caller at a time.
int run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

unsigned char* dynamic_shared();
void block_barrier();
// Waits for the lanes of `mask`.
void warp_barrier(unsigned mask);
// The same; `value` of each of them can then be read until they meet again.
void warp_exchange(unsigned mask, uint64_t value);
uint64_t lane_value(unsigned lane);
unsigned lane();
// Sums `value` over all threads of the block, as __syncthreads_count and its kin need it.
uint64_t block_sum(uint64_t value);

template <class T>
uint64_t bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t out = 0;
  std::memcpy(&out, &value, sizeof(T));
  return out;
}
template <class T>
T from_bits(uint64_t bits) {
  T out;
  std::memcpy(&out, &bits, sizeof(T));
  return out;
}

template <class T>
T shuffle(unsigned mask, T value, int source, int width) {
  const int self = int(lane()), base = self / width * width;
  warp_exchange(mask, bits(value));
  T out = value;
  if (source >= base && source < base + width) out = from_bits<T>(lane_value(unsigned(source)));
  warp_barrier(mask);
  return out;
}

}  // namespace forebay::host

#define threadIdx (::forebay::host::position.thread)
#define blockIdx (::forebay::host::position.block)
#define blockDim (::forebay::host::position.block_size)
#define gridDim (::forebay::host::position.grid_size)
constexpr int warpSize = 32;

inline void __syncthreads() { ::forebay::host::block_barrier(); }
inline int __syncthreads_count(int predicate) {
  return int(::forebay::host::block_sum(predicate != 0));
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(!predicate) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::forebay::host::warp_barrier(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int base = int(::forebay::host::lane()) / width * width;
  return ::forebay::host::shuffle(mask, value, base + source % width, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return ::forebay::host::shuffle(mask, value, int(::forebay::host::lane()) ^ lanes, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return ::forebay::host::shuffle(mask, value, int(::forebay::host::lane()) - int(delta), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return ::forebay::host::shuffle(mask, value, int(::forebay::host::lane()) + int(delta), width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  ::forebay::host::warp_exchange(mask, predicate != 0);
  unsigned out = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) out |= unsigned(::forebay::host::lane_value(lane)) << lane;
  ::forebay::host::warp_barrier(mask);
  return out;
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  ::forebay::host::warp_exchange(mask, value);
  unsigned out = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) out ^= unsigned(::forebay::host::lane_value(lane));
  ::forebay::host::warp_barrier(mask);
  return out;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  ::forebay::host::warp_exchange(mask, ::forebay::host::bits(value));
  unsigned out = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if ((mask >> lane & 1) && ::forebay::host::lane_value(lane) == ::forebay::host::bits(value))
      out |= 1u << lane;
  ::forebay::host::warp_barrier(mask);
  return out;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  ::forebay::host::warp_exchange(mask, value);
  unsigned out = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) {
      const unsigned other = unsigned(::forebay::host::lane_value(lane));
      out = other > out ? other : out;
    }
  ::forebay::host::warp_barrier(mask);
  return out;
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return ~__reduce_max_sync(mask, ~value);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(unsigned(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __float_as_uint(float value) {
  return ::forebay::host::from_bits<unsigned>(::forebay::host::bits(value));
}
inline int __float_as_int(float value) { return int(__float_as_uint(value)); }
inline float __uint_as_float(unsigned value) {
  return ::forebay::host::from_bits<float>(::forebay::host::bits(value));
}
inline float __int_as_float(int value) { return __uint_as_float(unsigned(value)); }
// The build forbids contraction, so these round as their names say.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float __fdividef(float a, float b) { return a / b; }

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

template <class T, class U>
T atomicAdd(T* address, U value) {
  const T old = *address;
  *address = T(old + T(value));
  return old;
}
template <class T, class U>
T atomicMax(T* address, U value) {
  const T old = *address;
  if (T(value) > old) *address = T(value);
  return old;
}
template <class T, class U>
T atomicMin(T* address, U value) {
  const T old = *address;
  if (T(value) < old) *address = T(value);
  return old;
}
template <class T, class U>
T atomicOr(T* address, U value) {
  const T old = *address;
  *address = T(old | T(value));
  return old;
}
template <class T, class U>
T atomicXor(T* address, U value) {
  const T old = *address;
  *address = T(old ^ T(value));
  return old;
}
template <class T, class U>
T atomicExch(T* address, U value) {
  const T old = *address;
  *address = T(value);
  return old;
}
template <class T, class U, class V>
T atomicCAS(T* address, U expected, V value) {
  const T old = *address;
  if (old == T(expected)) *address = T(value);
  return old;
}
