// CRC-32C as arithmetic: polynomials over GF(2) modulo P, lowest bit first (bit 31 - i of a
// register is the coefficient of x^i). A register that starts from 0 ends as the message times
// x^32: linear in the message and blind to zeros in front of it, so the register of a message is
// the sum of its parts' registers, each multiplied by x^(8 * bytes that follow the part).
#pragma once
#include <cstdint>

#include "common/dtypes.cuh"

namespace forebay::kv {

constexpr uint32_t kPolynomial = 0x82f63b78u;
constexpr uint32_t kOne = 0x80000000u;
constexpr uint32_t kX = 0x40000000u;

FOREBAY_DEVICE constexpr uint32_t times_x(uint32_t a) {
  return a >> 1 ^ (kPolynomial & (0u - (a & 1)));
}

FOREBAY_DEVICE constexpr uint32_t times(uint32_t a, uint32_t b) {
  uint32_t out = 0;
  for (int i = 0; i < 32; ++i) {
    out ^= b & (0u - (a >> 31));
    a <<= 1;
    b = times_x(b);
  }
  return out;
}

constexpr uint32_t power_of_x(uint64_t exponent) {
  uint32_t out = kOne, square = kX;
  for (; exponent != 0; exponent >>= 1) {
    if (exponent & 1) out = times(out, square);
    square = times(square, square);
  }
  return out;
}

// What a register that starts from ones, and is inverted at the end, adds to one that does neither.
constexpr uint32_t ends(uint64_t bytes) { return ~times(~0u, power_of_x(8 * bytes)); }

}  // namespace forebay::kv
