// A stack of its own for a function that can stop in the middle and go on later.
#pragma once
#include <ucontext.h>

#include <cstddef>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace forebay::host {

// Entered and left only by switches between the scheduler and itself.
class Fiber {
 public:
  static constexpr size_t kStackBytes = 64 * 1024;
  Fiber() = default;
  Fiber(Fiber&&) = default;
  ~Fiber();

  // `entry` runs on the fiber's stack at the first resume() and must end with leave_for_good().
  void start(void (*entry)());
  void resume();          // called by the scheduler
  void pause();           // called on the fiber
  void leave_for_good();  // called on the fiber, as the last thing

 private:
  std::unique_ptr<unsigned char[]> stack_;
#if defined(__x86_64__)
  void* own_ = nullptr;
  void* caller_ = nullptr;
#else
  ucontext_t own_, caller_;
#endif
  const void* caller_stack_ = nullptr;
  size_t caller_stack_bytes_ = 0;
  void arrived(void* fake_stack);
  void switch_to_caller(void** fake_stack);
  static void begin();
};

}  // namespace forebay::host
