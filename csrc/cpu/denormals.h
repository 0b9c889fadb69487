// Denormal numbers count as zeros while the kernels compute.
//
// Many processors take a hundred times as long for an operation that reads or makes a denormal number, and recurrent
// layers make them: states and gradients that decay towards zero pass through that range. Torch's threads have torch's
// own setting (torch.set_flush_denormal), so a kernel sets its own on the thread that it is called on, and puts back
// the former one when it returns. The price: magnitudes below 1.2e-38 (float32) or 2.2e-308 (float64), read or
// computed, are zeros of the same sign. Copied states keep them.
#pragma once

#include <cstdint>

namespace fused_rnn {
namespace FUSED_RNN_ISA {

class DenormalsAsZeros {
 public:
  DenormalsAsZeros() : before_(read()) { write(before_ | kAsZeros); }
  ~DenormalsAsZeros() { write(before_); }
  DenormalsAsZeros(const DenormalsAsZeros&) = delete;
  DenormalsAsZeros& operator=(const DenormalsAsZeros&) = delete;

 private:
  // The "memory" of write() keeps the compiler from moving loads and stores, and so the arithmetic between them,
  // across.
#if defined(__x86_64__)
  using Register = uint32_t;                    // MXCSR
  static constexpr Register kAsZeros = 0x8040;  // flush to zero, denormals are zero
  static Register read() { return __builtin_ia32_stmxcsr(); }
  static void write(Register value) { __asm__ volatile("ldmxcsr %0" : : "m"(value) : "memory"); }
#elif defined(__aarch64__)
  using Register = uint64_t;                     // FPCR
  static constexpr Register kAsZeros = 1 << 24;  // FZ: operands and results alike
  static Register read() {
    Register value;
    __asm__ volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void write(Register value) { __asm__ volatile("msr fpcr, %0" : : "r"(value) : "memory"); }
#else  // as slow as the processor is with them
  using Register = uint32_t;
  static constexpr Register kAsZeros = 0;
  static Register read() { return 0; }
  static void write(Register) {}
#endif

  const Register before_;
};

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
