// CRC-32C of a stream of bytes on a CPU, computed while they are copied.
//
// With carry-less multiplication, the last kGranule bytes stand for everything before them: each
// 128 bits of theirs are multiplied by x^(8 * kGranule) and added to the 128 bits that come
// kGranule bytes later. Zeros in front of a message change nothing, so a stream may begin with part
// of a granule; what it ends with goes through the processor's CRC instruction. Without these
// instructions: tables, eight bytes at a time.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>

#include "kv/checksum.h"

#if defined(__PCLMUL__) && defined(__SSE4_2__)
#include <immintrin.h>
#define FOREBAY_FOLDS 1
#endif

namespace forebay::kv {

#if defined(FOREBAY_FOLDS)

#if defined(__AVX512F__)
constexpr size_t kGranule = 256;
#else
constexpr size_t kGranule = 64;
#endif

inline uint32_t register_of(uint32_t value, const uint8_t* bytes, size_t count) {
  uint64_t wide = value;
  for (; count >= 8; bytes += 8, count -= 8) {
    uint64_t word;
    memcpy(&word, bytes, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  for (; count > 0; ++bytes, --count) wide = _mm_crc32_u8(uint32_t(wide), *bytes);
  return uint32_t(wide);
}

// The halves of 128 bits, seen as factors of 32 bits in the low end of 64: a product of two
// registers that are read lowest bit first comes out one bit too low.
constexpr uint64_t kFirstHalf = power_of_x(8 * kGranule + 64 - 33);
constexpr uint64_t kSecondHalf = power_of_x(8 * kGranule - 33);

// `count` bytes, a multiple of kGranule, from `from` to `to` (null: nowhere).
template <bool kStream>
void fold_xmm(uint8_t* state, uint8_t* to, const uint8_t* from, size_t count) {
  constexpr int N = kGranule / 16;
  const __m128i factors = _mm_set_epi64x(int64_t(kSecondHalf), int64_t(kFirstHalf));
  __m128i folded[N];
  for (int i = 0; i < N; ++i) folded[i] = _mm_load_si128(reinterpret_cast<__m128i*>(state) + i);
  for (size_t at = 0; at < count; at += kGranule) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const __m128i next = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at) + i);
      if (to != nullptr) {
        auto* place = reinterpret_cast<__m128i*>(to + at) + i;
        kStream ? _mm_stream_si128(place, next) : _mm_storeu_si128(place, next);
      }
      const __m128i first = _mm_clmulepi64_si128(folded[i], factors, 0x00);
      const __m128i second = _mm_clmulepi64_si128(folded[i], factors, 0x11);
      folded[i] = _mm_xor_si128(_mm_xor_si128(first, second), next);
    }
  }
  for (int i = 0; i < N; ++i) _mm_store_si128(reinterpret_cast<__m128i*>(state) + i, folded[i]);
}

#if defined(__AVX512F__)
template <bool kStream>
__attribute__((target("vpclmulqdq"))) void fold_zmm(uint8_t* state, uint8_t* to,
                                                    const uint8_t* from, size_t count) {
  constexpr int N = kGranule / 64;
  const __m512i factors = _mm512_set4_epi64(int64_t(kSecondHalf), int64_t(kFirstHalf),
                                            int64_t(kSecondHalf), int64_t(kFirstHalf));
  __m512i folded[N];
  for (int i = 0; i < N; ++i) folded[i] = _mm512_load_si512(state + 64 * i);
  for (size_t at = 0; at < count; at += kGranule) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const __m512i next = _mm512_loadu_si512(from + at + 64 * i);
      if (to != nullptr) {
        uint8_t* place = to + at + 64 * i;
        kStream ? _mm512_stream_si512(reinterpret_cast<__m512i*>(place), next)
                : _mm512_storeu_si512(place, next);
      }
      const __m512i first = _mm512_clmulepi64_epi128(folded[i], factors, 0x00);
      const __m512i second = _mm512_clmulepi64_epi128(folded[i], factors, 0x11);
      folded[i] = _mm512_ternarylogic_epi64(first, second, next, 0x96);
    }
  }
  for (int i = 0; i < N; ++i) _mm512_store_si512(state + 64 * i, folded[i]);
}
#endif

template <bool kStream>
void fold(uint8_t* state, uint8_t* to, const uint8_t* from, size_t count) {
#if defined(__AVX512F__)
  static const bool wide = __builtin_cpu_supports("vpclmulqdq");
  if (wide) return fold_zmm<kStream>(state, to, from, count);
#endif
  fold_xmm<kStream>(state, to, from, count);
}

// The register of bytes that come one stretch after another.
class Folded {
 public:
  // Only at the start: fewer than kGranule bytes.
  void begin(const uint8_t* bytes, size_t count) {
    memcpy(state_ + kGranule - count, bytes, count);
  }
  // A multiple of kGranule, copied to `to` (null: nowhere). `stream`: past the caches; `to` is then
  // at a multiple of 64 bytes.
  void add(uint8_t* to, const uint8_t* from, size_t count, bool stream) {
    stream ? fold<true>(state_, to, from, count) : fold<false>(state_, to, from, count);
  }
  uint32_t finish(const uint8_t* bytes, size_t count) const {
    return register_of(register_of(0, state_, kGranule), bytes, count);
  }

 private:
  alignas(64) uint8_t state_[kGranule] = {};
};

inline void finish_streaming() { _mm_sfence(); }

// `stream`: past the caches, as far as whole lines are written.
inline void copy(uint8_t* to, const uint8_t* from, size_t count, bool stream) {
  if (!stream || reinterpret_cast<uintptr_t>(to) % 64 != 0 || count % 64 != 0) {
    if (count % 64 != 0 || count > 1024)
      memcpy(to, from, count);
    else
      for (size_t at = 0; at < count; at += 64) memcpy(to + at, from + at, 64);
    return;
  }
  for (size_t at = 0; at < count; at += 64) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto* next = reinterpret_cast<const __m128i*>(from + at) + i;
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + at) + i, _mm_loadu_si128(next));
    }
  }
}

#else  // FOREBAY_FOLDS

constexpr size_t kGranule = 64;

struct Tables {
  uint32_t after[8][256];  // the register of a byte, followed by 0..7 zeros

  constexpr Tables() : after() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t value = byte;
      for (int i = 0; i < 8; ++i) value = times_x(value);
      for (int i = 0; i < 8; ++i) {
        after[i][byte] = value;
        for (int j = 0; j < 8; ++j) value = times_x(value);
      }
    }
  }
};
inline constexpr Tables kTables;

inline uint32_t register_of(uint32_t value, const uint8_t* bytes, size_t count) {
  const auto& after = kTables.after;
  for (; count >= 8; bytes += 8, count -= 8) {
    const uint32_t first = value ^ (uint32_t(bytes[0]) | uint32_t(bytes[1]) << 8 |
                                    uint32_t(bytes[2]) << 16 | uint32_t(bytes[3]) << 24);
    value = after[7][first & 255] ^ after[6][first >> 8 & 255] ^ after[5][first >> 16 & 255] ^
            after[4][first >> 24] ^ after[3][bytes[4]] ^ after[2][bytes[5]] ^ after[1][bytes[6]] ^
            after[0][bytes[7]];
  }
  for (; count > 0; ++bytes, --count) value = value >> 8 ^ after[0][(value ^ *bytes) & 255];
  return value;
}

class Folded {
 public:
  void begin(const uint8_t* bytes, size_t count) { value_ = register_of(0, bytes, count); }
  void add(uint8_t* to, const uint8_t* from, size_t count, bool) {
    if (to != nullptr) memcpy(to, from, count);
    value_ = register_of(value_, from, count);
  }
  uint32_t finish(const uint8_t* bytes, size_t count) const {
    return register_of(value_, bytes, count);
  }

 private:
  uint32_t value_ = 0;
};

inline void finish_streaming() {}

inline void copy(uint8_t* to, const uint8_t* from, size_t count, bool) { memcpy(to, from, count); }

#endif  // FOREBAY_FOLDS

}  // namespace forebay::kv
