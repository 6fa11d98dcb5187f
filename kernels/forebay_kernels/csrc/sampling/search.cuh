// Where a row is cut, by the digits of ranks: counts and masses of each digit's values, of those
// ids only whose higher digits are known to be the cut's. For kernels only.
#pragma once
#include "sampling/row.cuh"

namespace forebay {

struct Digits {
  uint32_t counts[kMaxDigits];
  uint64_t masses[kMaxDigits];
  uint64_t cut;  // the digit found, its count and what lies above it
  uint64_t count_at, count_above, mass_above;
  uint64_t smallest;  // rank of the digits found
  bool found;
};

// Ids with equal digits that follow one another in a thread cost one addition.
class Tally {
 public:
  __device__ Tally(Digits& digits, uint64_t prefix, int shift, int bits)
      : digits_(digits), prefix_(prefix), shift_(shift), bits_(bits) {}

  __device__ void add(uint64_t rank, uint64_t weight) {
    if (rank >> (shift_ + bits_) != prefix_) return;
    const int digit = int(rank >> shift_) & ((1 << bits_) - 1);
    if (digit != digit_) {
      flush();
      digit_ = digit;
    }
    count_ += 1;
    mass_ += weight;
  }

  __device__ void flush() {
    if (count_ > 0) {
      atomicAdd(&digits_.counts[digit_], count_);
      atomicAdd(reinterpret_cast<Unsigned64*>(&digits_.masses[digit_]), Unsigned64(mass_));
    }
    count_ = 0;
    mass_ = 0;
  }

 private:
  Digits& digits_;
  uint64_t prefix_;
  int shift_, bits_;
  int digit_ = -1;
  uint32_t count_ = 0;
  uint64_t mass_ = 0;
};

// The smallest rank that stays when ids stay from the largest rank down until there are `wanted` of
// them, or (by_mass) until they weigh `wanted` or more together with `base`; 0: never so many.
// for_each(visit) calls visit(rank, weight) for every id, spread over the threads of the block, all
// of which call this.
template <class ForEach>
__device__ __forceinline__ uint64_t search(Digits& digits, bool by_mass, uint64_t wanted,
                                           uint64_t base, ForEach for_each) {
  uint64_t prefix = 0, count_above = 0, mass_above = base;
  int shift = kRankBits;
  __syncthreads();
  for (int round = 0;; ++round) {
    const int bits = digit_bits(round), size = 1 << bits;
    shift -= bits;
    for (int i = int(threadIdx.x); i < size; i += kThreads) digits.counts[i] = 0;
    for (int i = int(threadIdx.x); i < size; i += kThreads) digits.masses[i] = 0;
    if (threadIdx.x == 0) {
      digits.found = false;
      digits.smallest = ~uint64_t(0);
    }
    __syncthreads();
    Tally tally(digits, prefix, shift, bits);
    for_each([&](uint64_t rank, uint64_t weight) { tally.add(rank, weight); });
    tally.flush();
    __syncthreads();
    const int each = size / kThreads, first = size - 1 - int(threadIdx.x) * each;
    uint64_t count = 0, mass = 0, total;
    for (int digit = first; digit > first - each; --digit) {
      count += digits.counts[digit];
      mass += digits.masses[digit];
    }
    count = block_scan(count, &total) + count_above;
    mass = block_scan(mass, &total) + mass_above;
    for (int digit = first; digit > first - each; --digit) {
      const uint64_t next_count = count + digits.counts[digit];
      const uint64_t next_mass = mass + digits.masses[digit];
      if ((by_mass ? mass : count) < wanted && (by_mass ? next_mass : next_count) >= wanted) {
        digits.cut = uint64_t(digit);
        digits.count_at = digits.counts[digit];
        digits.count_above = count;
        digits.mass_above = mass;
        digits.found = true;
      }
      count = next_count;
      mass = next_mass;
    }
    __syncthreads();
    if (!digits.found) return 0;
    prefix = prefix << bits | digits.cut;
    count_above = digits.count_above;
    mass_above = digits.mass_above;
    const bool all_stay = by_mass ? digits.count_at == 1 : count_above + digits.count_at == wanted;
    __syncthreads();
    if (!all_stay) continue;
    uint64_t smallest = ~uint64_t(0);
    for_each([&](uint64_t rank, uint64_t) {
      if (rank >> shift == prefix && rank < smallest) smallest = rank;
    });
    atomicMin(reinterpret_cast<Unsigned64*>(&digits.smallest), Unsigned64(smallest));
    __syncthreads();
    return digits.smallest;
  }
}

}  // namespace forebay
