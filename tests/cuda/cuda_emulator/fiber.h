// Fibers with small stacks, because a grid has more threads than an operating system can start.
//
// The x86-64 switch saves only the callee-saved registers, which is about twenty times cheaper than swapcontext and its
// system calls. Other architectures use swapcontext. Only emulator.cpp may include this file, because the assembly
// below defines a symbol.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define FUSED_RNN_FIBER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FUSED_RNN_FIBER_ASAN 1
#endif
#endif
#if defined(FUSED_RNN_FIBER_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && defined(__ELF__) && !defined(FUSED_RNN_FIBER_UCONTEXT)
extern "C" void fused_rnn_switch_stack(void** save, void* load);
asm(R"(
.text
.type fused_rnn_switch_stack, @function
fused_rnn_switch_stack:
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
.size fused_rnn_switch_stack, . - fused_rnn_switch_stack
)");
#else
#if !defined(FUSED_RNN_FIBER_UCONTEXT)
#define FUSED_RNN_FIBER_UCONTEXT
#endif
#include <ucontext.h>
#endif

namespace fused_rnn {
namespace cuda {
namespace emulation {

// Stacks, kept for later launches. Their pages take memory only after they have been accessed.
class Stacks {
 public:
#if defined(FUSED_RNN_FIBER_ASAN)
  static constexpr size_t kBytes = 256 << 10;  // the sanitizer's frames are several times larger
#else
  static constexpr size_t kBytes = 64 << 10;
#endif

  char* at(size_t i) {
    while (i / kPerChunk >= chunks_.size()) {
      const size_t bytes = kPerChunk * kBytes;
      void* chunk = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (chunk == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_NOHUGEPAGE)
      madvise(chunk, bytes, MADV_NOHUGEPAGE);  // huge pages would back every stack completely
#endif
      chunks_.push_back(static_cast<char*>(chunk));
    }
    return chunks_[i / kPerChunk] + i % kPerChunk * kBytes;
  }

 private:
  static constexpr size_t kPerChunk = 256;
  std::vector<char*> chunks_;
};

// A flow of control of its own, which returns to the host whenever it waits.
class Fiber {
 public:
  // The next resume() calls `entry`, which must end with suspend(true). `color` varies the first frame's address:
  // frames that lie a power of two apart would all fall into the same few cache sets.
  void start(char* stack, size_t color, void (*entry)()) {
    stack_ = stack;
    entry_ = entry;
    *canary() = kCanary;
    const size_t bytes = Stacks::kBytes - color % 32 * 192;
#if defined(FUSED_RNN_FIBER_ASAN)
    __asan_unpoison_memory_region(stack, Stacks::kBytes);  // frames of its last user that never returned
#endif
#if defined(FUSED_RNN_FIBER_UCONTEXT)
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, enter, 0);
#else
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top =
        nullptr;  // the return address of enter(); at its start the ABI requires the stack pointer to be 8 modulo 16
    *--top = reinterpret_cast<void*>(enter);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    context_ = top;
#endif
  }

  // Called by the host: runs the fiber until it suspends itself.
  void resume() {
    running_ = this;
#if defined(FUSED_RNN_FIBER_ASAN)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack_, Stacks::kBytes);
#endif
    change(&host_, &context_);
#if defined(FUSED_RNN_FIBER_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    if (*canary() != kCanary) {  // without guard pages: two mappings per stack would exceed what Linux allows
      std::fprintf(stderr, "CUDA emulator: a thread's stack has overflowed its %zu bytes\n", Stacks::kBytes);
      std::abort();
    }
  }

  // Called by the fiber: returns to the host; the fiber is not resumed again if `last`.
  void suspend(bool last = false) {
#if defined(FUSED_RNN_FIBER_ASAN)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, host_stack_, host_stack_bytes_);
#endif
    change(&context_, &host_);
#if defined(FUSED_RNN_FIBER_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    static_cast<void>(last);
  }

 private:
  static constexpr uint64_t kCanary = 0x5ca1ab1e0ddba11u;

#if defined(FUSED_RNN_FIBER_UCONTEXT)
  using Context = ucontext_t;
  static void change(Context* save, Context* load) { swapcontext(save, load); }
#else
  using Context = void*;  // the stack pointer; the registers are saved on the stack
  static void change(Context* save, Context* load) { fused_rnn_switch_stack(save, *load); }
#endif

  static void enter() {
#if defined(FUSED_RNN_FIBER_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &host_stack_, &host_stack_bytes_);
#endif
    running_->entry_();
  }

  uint64_t* canary() const { return reinterpret_cast<uint64_t*>(stack_); }

  inline static Fiber* running_ = nullptr;
  inline static Context host_{};
#if defined(FUSED_RNN_FIBER_ASAN)
  inline static const void* host_stack_ = nullptr;
  inline static size_t host_stack_bytes_ = 0;
#endif

  Context context_{};
  char* stack_ = nullptr;
  void (*entry_)() = nullptr;
};

}  // namespace emulation
}  // namespace cuda
}  // namespace fused_rnn
