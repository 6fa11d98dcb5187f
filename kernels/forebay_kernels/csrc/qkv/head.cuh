// A head in the registers of a few neighbouring threads: read, normed, rotated, written.
#pragma once
#include <initializer_list>

#include "qkv/cache.cuh"

namespace forebay {

// Values of T that one access of 16 bytes reads or writes.
template <class T>
constexpr int kPack = 16 / int(sizeof(T));

// The lanes of a warp that share `threadIdx.x / lanes`, a power of two of them.
__device__ __forceinline__ unsigned lanes_mask(int lanes) {
  const unsigned thread =
      threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * unsigned(threadIdx.z));
  return (lanes == 32 ? 0xffffffffu : (1u << lanes) - 1) << (thread % 32 / lanes * lanes);
}
__device__ __forceinline__ float lanes_sum(float value, int lanes, unsigned mask) {
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(mask, value, distance);
  return value;
}

// Threads for a head of `packs`: two packs each, a power of two.
inline int lanes_for(int packs) {
  int lanes = 1;
  while (2 * lanes < packs) lanes *= 2;
  return lanes;
}

// What a thread holds of every head. Where (i, i + rotated / 2) are pairs, its two packs are
// partners, so that a rotation needs no other thread; what is not rotated is shared out likewise.
template <class T>
struct HeadLane {
  int at[2];      // the packs' first values
  bool holds[2];  // which packs exist
  bool turns[2];  // interleaved: which packs are rotated; else [0] says it of both
  int angle[2];   // where kPack / 2 angles each begin
  bool interleaved;

  __device__ __forceinline__ HeadLane(int lane, int width, int rotated, bool interleaved_)
      : interleaved(interleaved_) {
    constexpr int N = kPack<T>;
    const int packs = width / N;
    const int pairs = interleaved ? 0 : rotated / 2 / N;
    const int rest = packs - 2 * pairs, half = (rest + 1) / 2;
    const bool paired = lane < pairs;
    const int nth = lane - pairs;
    const int first = paired ? lane : 2 * pairs + nth;
    const int second = paired ? lane + pairs : 2 * pairs + half + nth;
    at[0] = first * N, at[1] = second * N;
    holds[0] = paired || nth < half;
    holds[1] = paired || nth < rest - half;
    turns[0] = interleaved ? holds[0] && at[0] < rotated : paired;
    turns[1] = interleaved ? holds[1] && at[1] < rotated : paired;
    angle[0] = interleaved ? at[0] / 2 : at[0];
    angle[1] = interleaved ? at[1] / 2 : at[0] + N / 2;
  }
};

template <class T>
struct Angles {
  static constexpr int N = kPack<T>;
  Pack<float, N / 2> cos[2], sin[2];

  // cos, sin: the token's rows.
  __device__ __forceinline__ void load(const HeadLane<T>& lane, const float* cos_row,
                                       const float* sin_row) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (!lane.turns[k]) continue;
      cos[k] = *reinterpret_cast<const Pack<float, N / 2>*>(cos_row + lane.angle[k]);
      sin[k] = *reinterpret_cast<const Pack<float, N / 2>*>(sin_row + lane.angle[k]);
    }
  }
};

// Every operation rounds on its own, as in torch and in the CPU twin: the same bits everywhere.
__device__ __forceinline__ void turn(float& a, float& b, float cos, float sin) {
  const float first = __fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin));
  b = __fadd_rn(__fmul_rn(b, cos), __fmul_rn(a, sin));
  a = first;
}

template <class T>
struct Head {
  static constexpr int N = kPack<T>;
  float values[2][N];

  __device__ __forceinline__ void unpack(const HeadLane<T>& lane, const Pack<T, N> (&packs)[2]) {
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int j = 0; j < N; ++j)
        values[k][j] = lane.holds[k] ? to_float(packs[k].values[j]) : 0.0f;
  }

  // All `lanes` threads of the head call it.
  __device__ __forceinline__ void norm(const HeadLane<T>& lane, const T* weight, int width,
                                       float eps, int lanes, unsigned mask) {
    Pack<T, N> packs[2];
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (lane.holds[k]) packs[k] = *reinterpret_cast<const Pack<T, N>*>(weight + lane.at[k]);
#pragma unroll
      for (int j = 0; j < N; ++j) squares += values[k][j] * values[k][j];
    }
    const float mean = lanes_sum(squares, lanes, mask) / float(width);
    const float factor = 1.0f / sqrtf(mean + eps);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (!lane.holds[k]) continue;
#pragma unroll
      for (int j = 0; j < N; ++j) values[k][j] *= factor * to_float(packs[k].values[j]);
    }
  }

  __device__ __forceinline__ void rotate(const HeadLane<T>& lane, const Angles<T>& angles) {
    if (lane.interleaved) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (!lane.turns[k]) continue;
#pragma unroll
        for (int j = 0; j < N / 2; ++j)
          turn(values[k][2 * j], values[k][2 * j + 1], angles.cos[k].values[j],
               angles.sin[k].values[j]);
      }
    } else if (lane.turns[0]) {
#pragma unroll
      for (int j = 0; j < N; ++j)
        turn(values[0][j], values[1][j], angles.cos[j / (N / 2)].values[j % (N / 2)],
             angles.sin[j / (N / 2)].values[j % (N / 2)]);
    }
  }

  // Out other than T is e4m3: multiplied by `inverse` first.
  template <class Out>
  __device__ __forceinline__ void store(const HeadLane<T>& lane, Out* out, float inverse) const {
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if (lane.holds[k]) store_pack(values[k], out + lane.at[k], inverse);
  }

  template <class Out>
  static __device__ __forceinline__ void store_pack(const float (&values)[N], Out* out,
                                                    float inverse) {
    Pack<Out, N> pack;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if constexpr (sizeof(Out) == 1)
        pack.values[j] = from_float<Out>(__fmul_rn(values[j], inverse));
      else
        pack.values[j] = from_float<Out>(values[j]);
    }
    *reinterpret_cast<Pack<Out, N>*>(out) = pack;
  }
};

template <class T>
__device__ __forceinline__ void load_head(Pack<T, kPack<T>> (&packs)[2], const HeadLane<T>& lane,
                                          const T* head) {
#pragma unroll
  for (int k = 0; k < 2; ++k)
    if (lane.holds[k]) packs[k] = *reinterpret_cast<const Pack<T, kPack<T>>*>(head + lane.at[k]);
}

// Whether rows of this many values can be read in packs and rotated by whole packs.
template <class T>
bool fits_packs(int64_t width, int64_t rotated, bool interleaved) {
  constexpr int N = kPack<T>;
  return width % N == 0 && rotated % (interleaved ? N : 2 * N) == 0 && rotated % 8 == 0;
}
template <class T>
bool strides_fit(std::initializer_list<int64_t> strides) {
  for (const int64_t stride : strides)
    if (stride % kPack<T> != 0) return false;
  return true;
}

}  // namespace forebay
