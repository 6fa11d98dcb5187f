// The CPU's sample: a row is read in pieces that stay in the first-level cache, with loops that
// vectorise. The cuts of top-k and top-p are found as on a GPU: a histogram of exponents leaves few
// candidates, which are searched exactly; where too many are left, the whole row is.
#include <algorithm>
#include <cstring>

#include "common/parallel.h"
#include "sampling/draw.cuh"

namespace forebay {
namespace {

constexpr int kPiece = 1024;
constexpr int kMaxPieces = FOREBAY_SAMPLE_VOCAB / kPiece;
constexpr int kCandidates = 8192;

// A row's logits as floats, piece by piece; an id that the bitmask forbids is -inf.
template <class T>
class Row {
 public:
  Row(const SampleParams& p, int64_t row)
      : logits_(static_cast<const T*>(p.logits) + row * p.row_stride),
        mask_(p.bitmask == nullptr
                  ? nullptr
                  : static_cast<const uint32_t*>(p.bitmask) + row * ((p.vocab + 31) / 32)),
        vocab_(int(p.vocab)) {}

  int pieces() const { return (vocab_ + kPiece - 1) / kPiece; }
  int size(int piece) const { return std::min(kPiece, vocab_ - piece * kPiece); }
  float at(int id) const { return to_float(logits_[id]); }
  bool masked() const { return mask_ != nullptr; }

  // `line` has room for kPiece floats.
  const float* raw(int piece, float* line) const {
    const T* from = logits_ + int64_t(piece) * kPiece;
    if constexpr (sizeof(T) == sizeof(float)) {
      return reinterpret_cast<const float*>(from);
    } else {
      const int count = size(piece);
      for (int i = 0; i < count; ++i) line[i] = to_float(from[i]);
      return line;
    }
  }

  const float* allowed(int piece, float* line) const {
    const float* from = raw(piece, line);
    if (mask_ == nullptr) return from;
    const uint32_t* words = mask_ + piece * (kPiece / 32);
    const int count = size(piece);
    const float none = float_of(0xff800000);
    for (int start = 0; start < count; start += 32) {
      const uint32_t word = words[start / 32];
      const int end = std::min(32, count - start);
      for (int i = 0; i < end; ++i) line[start + i] = word >> i & 1 ? from[start + i] : none;
    }
    return line;
  }

 private:
  const T* logits_;
  const uint32_t* mask_;
  int vocab_;
};

struct Survey {
  bool possible;
  int best_id;
  float best, largest;
};

template <class T>
Survey survey_of(const Row<T>& row, float* line) {
  uint32_t largest = 0, smallest = ~0u, best = kKeyOfMinusInfinity;
  int best_piece = -1;
  for (int piece = 0; piece < row.pieces(); ++piece) {
    const int count = row.size(piece);
    const float* logits = row.raw(piece, line);
    uint32_t high = 0, low = ~0u;
    for (int i = 0; i < count; ++i) {
      const uint32_t key = key_of(logits[i]);
      high = std::max(high, key);
      low = std::min(low, key);
    }
    largest = std::max(largest, high);
    smallest = std::min(smallest, low);
    if (row.masked()) {
      logits = row.allowed(piece, line);
      high = 0;
      for (int i = 0; i < count; ++i) high = std::max(high, key_of(logits[i]));
    }
    if (high > best) {
      best = high;
      best_piece = piece;
    }
  }
  const bool broken = largest >= kKeyOfInfinity || smallest < kKeyOfMinusInfinity;
  if (best_piece < 0 || broken) return {false, -1, 0.0f, 0.0f};
  const float* logits = row.allowed(best_piece, line);
  int at = 0;
  while (key_of(logits[at]) != best) ++at;
  return {true, best_piece * kPiece + at, logit_of(best), logit_of(largest)};
}

// Of ids that min-p and the bitmask let be; 0 for others.
struct Weigher {
  float best, scale;
  uint64_t lowest;

  void operator()(const float* logits, int count, uint64_t* weights) const {
    for (int i = 0; i < count; ++i) {
      const uint64_t weight = weight_of(exponent_of(logits[i], best, scale));
      weights[i] = weight >= lowest ? weight : 0;
    }
  }
};

uint64_t sum_of(const uint64_t* weights, int count) {
  uint64_t sum = 0;
  for (int i = 0; i < count; ++i) sum += weights[i];
  return sum;
}

// Rows that are cut also get their ids' bins; kLastBin + 1 where the weight is 0.
void bins_of(const Weigher& weigher, const float* logits, const uint64_t* weights, int count,
             int32_t* bins) {
  for (int i = 0; i < count; ++i) {
    const float exponent = exponent_of(logits[i], weigher.best, weigher.scale);
    const float inside = exponent > kLowestExponent ? exponent : kLowestExponent;
    const int32_t bin = bin_of(inside);
    bins[i] = weights[i] > 0 ? bin : kLastBin + 1;
  }
}

struct Scratch {
  float line[kPiece];
  uint64_t weights[kPiece];
  int32_t bins[kPiece];
  uint8_t flags[kPiece];
  uint32_t histogram[2][kBins];
  uint64_t sums[kMaxPieces];
  uint64_t candidates[kCandidates + kPiece];
  uint32_t counts[kMaxDigits];
  uint64_t masses[kMaxDigits];
};

template <class T>
void count_bins(const Row<T>& row, const Weigher& weigher, Scratch& s) {
  std::memset(s.histogram, 0, sizeof(s.histogram));
  for (int piece = 0; piece < row.pieces(); ++piece) {
    const int count = row.size(piece);
    const float* logits = row.allowed(piece, s.line);
    weigher(logits, count, s.weights);
    bins_of(weigher, logits, s.weights, count, s.bins);
    // Neighbours in different tables: an addition need not wait for the one before it.
    for (int i = 0; i + 1 < count; i += 2) {
      s.histogram[0][s.bins[i]] += 1;
      s.histogram[1][s.bins[i + 1]] += 1;
    }
    if (count % 2 != 0) s.histogram[0][s.bins[count - 1]] += 1;
  }
  for (int i = 0; i < kBins; ++i) s.histogram[0][i] += s.histogram[1][i];
  s.histogram[0][kLastBin + 1] = 0;
}

Plan make_plan(const Settings& settings, const uint32_t* histogram) {
  Plan plan = Plan::whole_row();
  uint64_t below = 0, below_k = 0;
  for (int bin = 0; settings.top_k > 0 && bin < kBins; ++bin) {
    if (below + histogram[bin] >= uint64_t(settings.top_k)) {
      plan.k_bin = bin;
      below_k = uint64_t(settings.top_k) - below;
      plan.k_need = uint32_t(below_k);
      break;
    }
    below += histogram[bin];
  }
  plan.sure = plan.unsure = plan.k_bin;
  if (settings.top_p == Settings::kAllOfIt) return plan;
  const int last = std::min(plan.k_bin, kLastBin);
  const auto stay = [&](int bin) { return bin == plan.k_bin ? below_k : histogram[bin]; };
  Split split = {0, 0, 0, 0};
  for (int bin = 0; bin <= last; ++bin) {
    if (stay(bin) == 0) continue;
    split.least_after += stay(bin) * least_of_bin(bin);
    split.most_after += stay(bin) * most_of_bin(bin);
  }
  plan.sure = -1;
  plan.unsure = last;
  for (int bin = 0; bin <= last; ++bin) {
    if (stay(bin) == 0) continue;
    const uint64_t least = stay(bin) * least_of_bin(bin), most = stay(bin) * most_of_bin(bin);
    split = {split.least + least, split.most + most, split.least_after - least,
             split.most_after - most};
    if (plan.sure < 0 && split.may_hold(settings.top_p)) plan.sure = bin;
    if (split.must_hold(settings.top_p)) {
      plan.unsure = bin;
      break;
    }
  }
  for (int bin = plan.sure; bin <= plan.unsure && bin < plan.k_bin && plan.k_bin < kBins; ++bin)
    plan.k_need += histogram[bin];
  return plan;
}

// Sums of sure weights by piece, candidates, and what lies between. Returns how many candidates
// there are, or -1: more than fit.
template <class T>
int64_t weigh(const Row<T>& row, const Weigher& weigher, const Plan& plan, Scratch& s,
              uint64_t* unsure_mass) {
  int64_t num_candidates = 0;
  *unsure_mass = 0;
  for (int piece = 0; piece < row.pieces(); ++piece) {
    const int count = row.size(piece);
    const float* logits = row.allowed(piece, s.line);
    weigher(logits, count, s.weights);
    bins_of(weigher, logits, s.weights, count, s.bins);
    uint64_t sure = 0, unsure = 0;
    uint32_t any = 0;
    for (int i = 0; i < count; ++i) {
      const int32_t bin = s.bins[i];
      sure += bin < plan.sure ? s.weights[i] : 0;
      unsure += (bin > plan.unsure) & (bin < plan.k_bin) ? s.weights[i] : 0;
    }
    for (int i = 0; i < count; ++i) {
      const int32_t bin = s.bins[i];
      const uint8_t flag =
          ((bin >= plan.sure) & (bin <= plan.unsure)) | (bin == plan.k_bin) ? 1 : 0;
      s.flags[i] = flag;
      any |= flag;
    }
    s.sums[piece] = sure;
    *unsure_mass += unsure;
    if (any == 0) continue;
    for (int i = 0; i < count; ++i) {
      s.candidates[num_candidates] = rank_of(key_of(logits[i]), uint32_t(piece * kPiece + i));
      num_candidates += s.flags[i];
    }
    if (num_candidates > kCandidates) return -1;
  }
  return num_candidates;
}

// As on a GPU; see search.cuh.
template <class ForEach>
uint64_t search(Scratch& s, bool by_mass, uint64_t wanted, uint64_t base, ForEach for_each) {
  uint64_t prefix = 0, count = 0, mass = base;
  int shift = kRankBits;
  for (int round = 0;; ++round) {
    const int bits = digit_bits(round);
    shift -= bits;
    std::memset(s.counts, 0, sizeof(s.counts));
    std::memset(s.masses, 0, sizeof(s.masses));
    for_each([&](uint64_t rank, uint64_t weight) {
      if (rank >> (shift + bits) != prefix) return;
      const int digit = int(rank >> shift) & ((1 << bits) - 1);
      s.counts[digit] += 1;
      s.masses[digit] += weight;
    });
    int digit = (1 << bits) - 1;
    for (; digit >= 0; --digit) {
      if ((by_mass ? mass + s.masses[digit] : count + s.counts[digit]) >= wanted) break;
      count += s.counts[digit];
      mass += s.masses[digit];
    }
    if (digit < 0) return 0;
    prefix = prefix << bits | uint64_t(digit);
    if (by_mass ? s.counts[digit] > 1 : count + s.counts[digit] != wanted) continue;
    uint64_t smallest = ~uint64_t(0);
    for_each([&](uint64_t rank, uint64_t) {
      if (rank >> shift == prefix) smallest = std::min(smallest, rank);
    });
    return smallest;
  }
}

// The smallest rank that stays; s.sums get the weights of all that stay, by piece.
template <class T>
uint64_t cut_row(const Row<T>& row, const Settings& settings, const Weigher& weigher, Scratch& s) {
  count_bins(row, weigher, s);
  const Plan plan = make_plan(settings, s.histogram[0]);
  uint64_t cut = 0, unsure_mass;
  int64_t num_candidates = weigh(row, weigher, plan, s, &unsure_mass);
  const auto for_each = [&](auto visit) {
    for (int64_t i = 0; i < num_candidates; ++i) {
      const uint64_t rank = s.candidates[i];
      const float logit = logit_of(key_of_rank(rank));
      if (rank >= cut) visit(rank, weight_of(exponent_of(logit, weigher.best, weigher.scale)));
    }
    for (int piece = 0; num_candidates < 0 && piece < row.pieces(); ++piece) {
      const int count = row.size(piece);
      const float* logits = row.allowed(piece, s.line);
      weigher(logits, count, s.weights);
      for (int i = 0; i < count; ++i) {
        const uint64_t rank = rank_of(key_of(logits[i]), uint32_t(piece * kPiece + i));
        if (s.weights[i] > 0 && rank >= cut) visit(rank, s.weights[i]);
      }
    }
  };
  for (int stage = 0; stage < 2;) {
    const bool listed = num_candidates >= 0, by_mass = stage == 1;
    uint64_t wanted = listed ? plan.k_need : uint64_t(settings.top_k), base = 0;
    if (by_mass) {
      base = listed ? sum_of(s.sums, row.pieces()) : 0;
      uint64_t total = base + (listed ? unsure_mass : 0);
      for_each([&](uint64_t, uint64_t weight) { total += weight; });
      wanted = settings.top_p == Settings::kAllOfIt ? 0 : share_of(settings.top_p, total);
    }
    if (wanted > 0) {
      const uint64_t found = search(s, by_mass, wanted, base, for_each);
      const float exponent = exponent_of(logit_of(key_of_rank(found)), weigher.best, weigher.scale);
      const bool told = found > 0 && base < wanted && (!by_mass || bin_of(exponent) <= plan.unsure);
      if (listed && !told) {
        num_candidates = -1;
        cut = 0;
        stage = 0;
        continue;
      }
      cut = found > 0 ? found : cut;
    }
    ++stage;
  }
  if (num_candidates < 0) std::fill_n(s.sums, row.pieces(), uint64_t(0));
  for_each([&](uint64_t rank, uint64_t weight) { s.sums[id_of_rank(rank) / kPiece] += weight; });
  return cut;
}

// The id at which the running sum of the weights, ids ascending, first exceeds the target.
// `*located`: the piece whose running sums are in s.weights, or -1; many draws from one row find it
// there.
template <class T>
int locate(const Row<T>& row, const Weigher& weigher, uint64_t cut, Scratch& s, uint64_t target,
           int* located) {
  int piece = 0;
  while (target >= s.sums[piece]) target -= s.sums[piece++];
  const int count = row.size(piece);
  if (piece != *located) {
    const float* logits = row.allowed(piece, s.line);
    weigher(logits, count, s.weights);
    uint64_t running = 0;
    for (int i = 0; i < count; ++i) {
      const uint64_t rank = rank_of(key_of(logits[i]), uint32_t(piece * kPiece + i));
      s.weights[i] = running += rank >= cut ? s.weights[i] : 0;
    }
    *located = piece;
  }
  return piece * kPiece + int(std::upper_bound(s.weights, s.weights + count, target) - s.weights);
}

template <class T>
uint64_t softmax_sum(const Row<T>& row, float largest, Scratch& s) {
  const Weigher weigher = {largest, kLog2e, 0};
  uint64_t sum = 0;
  for (int piece = 0; piece < row.pieces(); ++piece) {
    weigher(row.raw(piece, s.line), row.size(piece), s.weights);
    sum += sum_of(s.weights, row.size(piece));
  }
  return sum;
}

// Draws [begin, end) share a row.
template <class T>
void draw_from_row(const SampleParams& p, int64_t begin, int64_t end, Scratch& s) {
  auto* tokens = static_cast<int32_t*>(p.token);
  auto* logprobs = static_cast<float*>(p.logprob);
  const Settings settings = settings_of(p, begin);
  const Row<T> row(p, std::max<int64_t>(settings.row, 0));
  Survey survey = {};
  if (settings.row >= 0) survey = survey_of(row, s.line);
  if (!survey.possible) {
    std::fill(tokens + begin, tokens + end, -1);
    if (logprobs != nullptr) std::fill(logprobs + begin, logprobs + end, float_of(0x7fc00000));
    return;
  }
  if (settings.greedy) {
    std::fill(tokens + begin, tokens + end, survey.best_id);
  } else {
    const Weigher weigher = {survey.best, settings.scale, settings.lowest};
    uint64_t cut = 0;
    if (settings.truncates()) {
      cut = cut_row(row, settings, weigher, s);
    } else {
      for (int piece = 0; piece < row.pieces(); ++piece) {
        weigher(row.allowed(piece, s.line), row.size(piece), s.weights);
        s.sums[piece] = sum_of(s.weights, row.size(piece));
      }
    }
    const uint64_t total = sum_of(s.sums, row.pieces());
    int located = -1;
    for (int64_t draw = begin; draw < end; ++draw)
      tokens[draw] = locate(row, weigher, cut, s, target_of(p, draw, total), &located);
  }
  if (logprobs == nullptr) return;
  const uint64_t sum = softmax_sum(row, survey.largest, s);
  for (int64_t draw = begin; draw < end; ++draw)
    logprobs[draw] = logprob_of(row.at(tokens[draw]), survey.largest, sum);
}

template <class T>
int start(const SampleParams& p) {
  // The arithmetic of an id takes as long as reading some sixteen of them.
  parallel_for(p.draws, p.vocab * int64_t(sizeof(T)) * 16, p.num_threads,
               [&](int64_t begin, int64_t end) {
                 alignas(64) Scratch scratch;
                 for (int64_t draw = begin; draw < end;) {
                   int64_t next = draw + 1;
                   while (next < end && shares_row(p, draw, next)) ++next;
                   draw_from_row<T>(p, draw, next, scratch);
                   draw = next;
                 }
               });
  return FOREBAY_OK;
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_sample(const SampleParams* params, void*) {
  using namespace forebay;
  const SampleParams& p = *params;
  if (p.vocab < 1 || p.vocab > FOREBAY_SAMPLE_VOCAB) return FOREBAY_UNSUPPORTED;
  switch (p.dtype) {
    case FOREBAY_F32:
      return start<float>(p);
    case FOREBAY_BF16:
      return start<bf16>(p);
    default:
      return FOREBAY_UNSUPPORTED;
  }
}
