#include "host/shim.h"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <vector>

#include "host/fiber.h"

namespace forebay::host {

Position position;

namespace {

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kEnded };

struct Thread {
  Fiber fiber;
  uint3 index;
  State state;
  unsigned mask;
  uint64_t value;
};

// One block at a time. Threads run in an order of the caller's choosing until they wait.
class Block {
 public:
  Block(dim3 size, size_t shared_bytes, const std::function<void()>& body, uint64_t order)
      : body_(body),
        threads_(size_t(size.x) * size.y * size.z),
        turn_(threads_.size()),
        shared_bytes_(std::max<size_t>(shared_bytes, 1)) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, shared_bytes_) != 0) throw std::bad_alloc();
    shared_.reset(static_cast<unsigned char*>(memory));
    for (size_t i = 0; i < threads_.size(); ++i)
      threads_[i].index = {unsigned(i % size.x), unsigned(i / size.x % size.y),
                           unsigned(i / size.x / size.y)};
    std::iota(turn_.begin(), turn_.end(), size_t(0));
    if (order == 1) std::reverse(turn_.begin(), turn_.end());
    if (order > 1) std::shuffle(turn_.begin(), turn_.end(), std::mt19937_64(order));
  }

  // FOREBAY_INVALID when threads wait for others that never come.
  int run();

  Thread& running() { return *running_; }
  size_t running_index() const { return size_t(running_ - threads_.data()); }
  size_t size() const { return threads_.size(); }
  Thread& at(size_t index) { return threads_[index]; }

  unsigned char* shared() { return shared_.get(); }

  void wait(State state) {
    running_->state = state;
    running_->fiber.pause();
  }

  const std::function<void()>& body() const { return body_; }

 private:
  bool release();

  const std::function<void()>& body_;
  std::vector<Thread> threads_;
  std::vector<size_t> turn_;
  size_t shared_bytes_;
  std::unique_ptr<unsigned char, decltype(&std::free)> shared_{nullptr, &std::free};
  Thread* running_ = nullptr;
};

Block* block = nullptr;
uint64_t order_of_threads = 0;

void fiber_main() {
  block->body()();
  block->running().state = State::kEnded;
  block->running().fiber.leave_for_good();
}

int Block::run() {
  std::memset(shared_.get(), 0xCD, shared_bytes_);
  for (Thread& thread : threads_) {
    thread.state = State::kReady;
    thread.fiber.start(&fiber_main);
  }
  while (true) {
    bool ran = false;
    for (size_t i : turn_) {
      if (threads_[i].state != State::kReady) continue;
      running_ = &threads_[i];
      position.thread = running_->index;
      running_->fiber.resume();
      ran = true;
    }
    if (std::all_of(threads_.begin(), threads_.end(),
                    [](const Thread& thread) { return thread.state == State::kEnded; }))
      return FOREBAY_OK;
    if (!release() && !ran) return FOREBAY_INVALID;
  }
}

bool Block::release() {
  bool any = false;
  for (size_t base = 0; base < threads_.size(); base += 32) {
    const size_t end = std::min(base + 32, threads_.size());
    for (size_t i = base; i < end; ++i) {
      if (threads_[i].state != State::kAtWarpBarrier) continue;
      const unsigned mask = threads_[i].mask;
      bool all = true;
      for (size_t j = base; j < end; ++j)
        if (mask >> (j - base) & 1)
          all = all && threads_[j].state == State::kAtWarpBarrier && threads_[j].mask == mask;
      if (!all) continue;
      for (size_t j = base; j < end; ++j)
        if (mask >> (j - base) & 1) threads_[j].state = State::kReady;
      any = true;
    }
  }
  if (any) return true;
  if (!std::all_of(threads_.begin(), threads_.end(),
                   [](const Thread& thread) { return thread.state == State::kAtBlockBarrier; }))
    return false;
  for (Thread& thread : threads_) thread.state = State::kReady;
  return true;
}

}  // namespace

int run(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body) {
  if (size_t(grid.x) * grid.y * grid.z == 0 || size_t(size.x) * size.y * size.z == 0 ||
      size_t(size.x) * size.y * size.z > 1024)
    return FOREBAY_INVALID;
  Block one(size, shared_bytes, body, order_of_threads);
  block = &one;
  position.block_size = size;
  position.grid_size = grid;
  int status = FOREBAY_OK;
  const size_t num_blocks = size_t(grid.x) * grid.y * grid.z;
  for (size_t n = 0; n < num_blocks && status == FOREBAY_OK; ++n) {
    const size_t i = order_of_threads == 1 ? num_blocks - 1 - n : n;
    position.block = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                      unsigned(i / grid.x / grid.y)};
    status = one.run();
  }
  block = nullptr;
  return status;
}

unsigned char* dynamic_shared() { return block->shared(); }
void block_barrier() { block->wait(State::kAtBlockBarrier); }
unsigned lane() { return unsigned(block->running_index() % 32); }

void warp_barrier(unsigned mask) {
  block->running().mask = mask;
  block->wait(State::kAtWarpBarrier);
}

void warp_exchange(unsigned mask, uint64_t value) {
  block->running().value = value;
  warp_barrier(mask);
}

uint64_t lane_value(unsigned source) {
  const size_t index = block->running_index() / 32 * 32 + source;
  return index < block->size() ? block->at(index).value : 0;
}

uint64_t block_sum(uint64_t value) {
  block->running().value = value;
  block_barrier();
  uint64_t sum = 0;
  for (size_t i = 0; i < block->size(); ++i) sum += block->at(i).value;
  block_barrier();
  return sum;
}

}  // namespace forebay::host

// 0: ascending, 1: descending (blocks too), more: shuffled by that seed. A kernel without races
// gives the same bytes in every order.
extern "C" void forebay_host_order(uint64_t order) { forebay::host::order_of_threads = order; }
