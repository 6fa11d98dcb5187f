#include "host/fiber.h"

#include <cstdint>
#include <vector>

namespace forebay::host {
namespace {

thread_local Fiber* starting = nullptr;
thread_local void (*starting_entry)() = nullptr;
// Stacks of fibers that are gone: fresh ones cost more than a small kernel's run.
thread_local std::vector<std::unique_ptr<unsigned char[]>> spare_stacks;

}  // namespace

#if defined(__x86_64__)
// Saves the callee-saved registers on the stack, *from = stack pointer, goes on at `to`.
extern "C" void forebay_fiber_switch(void** from, void* to);
asm(R"(
.text
.local forebay_fiber_switch
.type forebay_fiber_switch, @function
forebay_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size forebay_fiber_switch, .-forebay_fiber_switch
)");
#endif

void Fiber::begin() {
  Fiber* self = starting;
  void (*entry)() = starting_entry;
  self->arrived(nullptr);
  entry();
  __builtin_trap();
}

Fiber::~Fiber() {
  if (stack_) spare_stacks.push_back(std::move(stack_));
}

void Fiber::start(void (*entry)()) {
  if (!stack_ && !spare_stacks.empty()) {
    stack_ = std::move(spare_stacks.back());
    spare_stacks.pop_back();
  }
  if (!stack_) stack_.reset(new unsigned char[kStackBytes]);
  starting_entry = entry;
#if defined(__x86_64__)
  // The stack pointer on entry to a function is 8 past a multiple of 16.
  auto top = (reinterpret_cast<uintptr_t>(stack_.get()) + kStackBytes) & ~uintptr_t(15);
  auto* slots = reinterpret_cast<void**>(top) - 2;
  *slots = reinterpret_cast<void*>(&Fiber::begin);
  own_ = slots - 6;
#else
  getcontext(&own_);
  own_.uc_stack.ss_sp = stack_.get();
  own_.uc_stack.ss_size = kStackBytes;
  own_.uc_link = nullptr;
  makecontext(&own_, &Fiber::begin, 0);
#endif
}

void Fiber::resume() {
  starting = this;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack_.get(), kStackBytes);
#endif
#if defined(__x86_64__)
  forebay_fiber_switch(&caller_, own_);
#else
  swapcontext(&caller_, &own_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Fiber::pause() {
  void* fake_stack = nullptr;
  switch_to_caller(&fake_stack);
  arrived(fake_stack);
}

void Fiber::leave_for_good() { switch_to_caller(nullptr); }

void Fiber::arrived(void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &caller_stack_, &caller_stack_bytes_);
#else
  (void)fake_stack;
#endif
}

void Fiber::switch_to_caller(void** fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, caller_stack_, caller_stack_bytes_);
#else
  (void)fake_stack;
#endif
#if defined(__x86_64__)
  forebay_fiber_switch(&own_, caller_);
#else
  swapcontext(&own_, &caller_);
#endif
}

}  // namespace forebay::host
