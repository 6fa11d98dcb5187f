// How the CPU's sample reads a row.
#pragma once
#include <algorithm>

#include "sampling/draw.cuh"

namespace forebay {
namespace {

constexpr int kPiece = 1024;
constexpr int kMaxPieces = FOREBAY_SAMPLE_VOCAB / kPiece;

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

}  // namespace
}  // namespace forebay
