// What a draw asks for, and the coarse histogram that finds out where its row will be cut.
#pragma once
#include "sampling/fixed.cuh"

namespace forebay {

struct Settings {
  int64_t row;  // -1: out of range
  float scale;  // of logits: log2(e) / temperature
  bool greedy;
  int64_t top_k;    // 0: all
  uint64_t lowest;  // weight that min-p lets stay, at least 1
  uint64_t top_p;   // in units of 2^-30; kAllOfIt: all

  static constexpr uint64_t kAllOfIt = ~uint64_t(0);
  FOREBAY_DEVICE bool truncates() const { return !greedy && (top_k > 0 || top_p != kAllOfIt); }
};

FOREBAY_DEVICE Settings settings_of(const SampleParams& p, int64_t draw) {
  const int64_t row = static_cast<const int32_t*>(p.rows)[draw];
  const float temperature = static_cast<const float*>(p.temperature)[draw];
  const int32_t top_k = static_cast<const int32_t*>(p.top_k)[draw];
  const float top_p = static_cast<const float*>(p.top_p)[draw];
  const float min_p = static_cast<const float*>(p.min_p)[draw];
  Settings out;
  out.row = row >= 0 && row < p.num_rows ? row : -1;
  out.greedy = !(temperature >= 0x1p-64f);
  out.scale = out.greedy ? 0.0f : multiply(divide(1.0f, temperature), kLog2e);
  out.top_k = top_k > 0 && top_k < p.vocab ? top_k : 0;
  const uint64_t lowest = min_p > 0.0f ? fixed_point(min_p < 1.0f ? min_p : 1.0f, kUnitBits) : 0;
  out.lowest = lowest > 1 ? lowest : 1;
  out.top_p = !(top_p < 1.0f) ? Settings::kAllOfIt
              : top_p > 0.0f  ? fixed_point(top_p, kShareBits)
                              : 1;
  return out;
}

// Neighbouring draws that differ in nothing but their random number share the work on their row.
FOREBAY_DEVICE bool shares_row(const SampleParams& p, int64_t draw, int64_t next) {
  const auto same = [&](const void* values) {
    return static_cast<const uint32_t*>(values)[draw] == static_cast<const uint32_t*>(values)[next];
  };
  return same(p.rows) && same(p.temperature) && same(p.top_k) && same(p.top_p) && same(p.min_p);
}

FOREBAY_DEVICE uint64_t target_of(const SampleParams& p, int64_t draw, uint64_t total) {
  const uint64_t bits = random_bits(static_cast<const uint64_t*>(p.seed)[draw],
                                    static_cast<const uint32_t*>(p.choice)[draw],
                                    static_cast<const uint32_t*>(p.position)[draw]);
  return multiply_high(bits, total);
}

// Bins of exponents: bin b has those in (-(b + 1) / 48, -b / 48], give or take a rounding. A larger
// logit is never in a later bin.
constexpr int kBins = 2048;
constexpr float kBinsPerUnit = 48.0f;
constexpr int kLastBin = kBins - 2;  // 42 * 48 = 2016: neither this nor the next has any id

FOREBAY_DEVICE int32_t bin_of(float exponent) { return int32_t(multiply(exponent, -kBinsPerUnit)); }

// Between these lies the weight of an id of the bin, with room for every rounding.
FOREBAY_DEVICE uint64_t most_of_bin(int32_t bin) {
  const uint64_t weight = weight_of(multiply(float(bin), -1.0f / kBinsPerUnit));
  return weight + (weight >> 12) + 1;
}
FOREBAY_DEVICE uint64_t least_of_bin(int32_t bin) {
  const uint64_t weight = weight_of(multiply(float(bin + 1), -1.0f / kBinsPerUnit));
  const uint64_t room = (weight >> 12) + 1;
  return weight > room ? weight - room : 0;
}

// Bounds of the weight of the ids up to a bin and of those after it, and what follows: may (must)
// the ids up to the bin hold the share top_p of all? Where top_p is near 1 little comes after the
// cut, and little is uncertain about it; a bound of the whole would be too coarse. Both ways are
// true from some bin on.
struct Split {
  uint64_t least, most, least_after, most_after;

  FOREBAY_DEVICE bool may_hold(uint64_t top_p) const {
    return holds(top_p, double(int64_t(most)), double(int64_t(least_after)));
  }
  FOREBAY_DEVICE bool must_hold(uint64_t top_p) const {
    return holds(top_p, double(int64_t(least)), double(int64_t(most_after)));
  }

 private:
  FOREBAY_DEVICE static bool holds(uint64_t top_p, double mass, double after) {
    const double share = multiply(double(int64_t(top_p)), 0x1p-30);
    return multiply(mass, subtract(1.0, share)) >= multiply(after, share);
  }
};

// What the counts of the bins tell of where the row is cut. Ids of bins before `sure` stay; those
// of [sure, unsure] and of `k_bin` are candidates, to be looked at one by one; those between count
// for the mass that top-p takes its share of, and go. `k_need` of the candidates stay by top-k; 0:
// it cuts nothing.
struct Plan {
  int32_t sure, unsure, k_bin;
  uint32_t k_need;

  FOREBAY_DEVICE static Plan whole_row() { return {kBins, kBins, kBins, 0}; }
  FOREBAY_DEVICE bool candidate(int32_t bin) const {
    return (bin >= sure && bin <= unsure) || bin == k_bin;
  }
};

// The digits of a rank, the most significant first, by which a cut is searched.
constexpr int kMaxDigits = 2048;
FOREBAY_DEVICE int digit_bits(int round) { return round < 2 ? 11 : 10; }

}  // namespace forebay
