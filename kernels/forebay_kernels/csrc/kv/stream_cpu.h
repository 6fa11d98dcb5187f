// A payload's bytes written and read in order by one thread of a CPU, with their register.
#pragma once
#include "kv/folding.h"

namespace forebay::kv {

// From so many bytes on, a payload is written past the caches: whoever needs it next would not find
// it there, and lines that are not read before they are written save a third of the memory's
// traffic.
constexpr int64_t kStreamedPayload = int64_t(8) << 20;

// What is put together from small pieces waits in a stage until it is worth copying.
class Writer {
 public:
  Writer(uint8_t* to, bool stream) : to_(to), stream_(stream) {
    const size_t past = reinterpret_cast<uintptr_t>(to) % 64;
    first_ = stream && past != 0 ? 64 - past : 0;
  }

  void put(const void* bytes, size_t count) {
    const auto* from = static_cast<const uint8_t*>(bytes);
    if (first_ == 0 && (staged_ == 0 || count >= 4 * kGranule)) {
      const size_t missing = (kGranule - staged_ % kGranule) % kGranule;
      if (staged_ != 0) {
        memcpy(stage_ + staged_, from, missing);
        staged_ += missing;
        from += missing;
        count -= missing;
        flush();
      }
      const size_t whole = count / kGranule * kGranule;
      if (whole != 0) {
        folded_.add(to_, from, whole, stream_);
        to_ += whole;
        from += whole;
        count -= whole;
      }
    }
    while (count > 0) {
      uint8_t* place = room();
      const size_t part = std::min(count, kStage - staged_);
      copy(place, from, part, false);
      wrote(part);
      from += part;
      count -= part;
    }
  }

  void put_zeros(size_t count) {
    while (count > 0) {
      uint8_t* place = room();
      const size_t part = std::min(count, kStage - staged_);
      memset(place, 0, part);
      wrote(part);
      count -= part;
    }
  }

  // Where at least kRoom bytes may be written; `wrote` says how many were.
  uint8_t* room() { return stage_ + staged_; }
  void wrote(size_t count) {
    staged_ += count;
    if (staged_ >= kStage) flush();
  }

  uint32_t finish() {
    flush();
    memcpy(to_, stage_, staged_);
    return folded_.finish(stage_, staged_);
  }

  static constexpr size_t kRoom = 4096;

 private:
  void flush() {
    size_t at = 0;
    if (first_ != 0) {
      if (staged_ < first_) return;
      memcpy(to_, stage_, first_);
      folded_.begin(stage_, first_);
      to_ += first_;
      at = first_;
      first_ = 0;
    }
    const size_t whole = (staged_ - at) / kGranule * kGranule;
    folded_.add(to_, stage_ + at, whole, stream_);
    to_ += whole;
    staged_ -= at + whole;
    memmove(stage_, stage_ + at + whole, staged_);
  }

  static constexpr size_t kStage = 8192;

  uint8_t* to_;
  bool stream_;
  size_t first_;
  size_t staged_ = 0;
  Folded folded_;
  alignas(64) uint8_t stage_[kStage + kRoom];
};

constexpr size_t kAheadAtOnce = 1024;  // bytes of a stretch

// Stretches of a cache that will be read, some of them asked for before their turn: where one ends
// the next lies anywhere, and the processor's own prefetching begins anew with each.
template <class Read>
class Ahead {
 public:
  explicit Ahead(Read read) : read_(read) {}

  // `from`: null or `count` bytes.
  void push(const uint8_t* from, size_t count) {
    if (from != nullptr)
      for (size_t at = 0; at < count; at += 64) __builtin_prefetch(from + at, 0, 2);
    waiting_[end_++ % kWaiting] = {from, count};
    bytes_ += count;
    while (bytes_ > kBytes || end_ - begin_ == kWaiting) pop();
  }
  void finish() {
    while (begin_ != end_) pop();
  }

 private:
  static constexpr size_t kBytes = 8192, kWaiting = 64;

  struct Stretch {
    const uint8_t* from;
    size_t count;
  };

  void pop() {
    const Stretch next = waiting_[begin_++ % kWaiting];
    bytes_ -= next.count;
    read_(next.from, next.count);
  }

  Read read_;
  size_t begin_ = 0, end_ = 0, bytes_ = 0;
  Stretch waiting_[kWaiting];
};

// Bytes that are read somewhere else too: their register alone, some ahead of that reader, who
// finds them in the first-level cache.
class Reader {
 public:
  explicit Reader(const uint8_t* from, size_t count) : from_(from), left_(count) {}

  void read_to(const uint8_t* end) {
    if (end <= from_) return;
    const size_t wanted = size_t(end - from_) + kGranule - 1;
    add(std::min(std::max(wanted, kAhead), left_) / kGranule * kGranule);
  }
  uint32_t finish() {
    add(left_ / kGranule * kGranule);
    return folded_.finish(from_, left_);
  }

 private:
  static constexpr size_t kAhead = 8192;

  void add(size_t count) {
    folded_.add(nullptr, from_, count, false);
    from_ += count;
    left_ -= count;
  }

  const uint8_t* from_;
  size_t left_;
  Folded folded_;
};

}  // namespace forebay::kv
