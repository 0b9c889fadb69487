// How to have the compiler keep a value in a register.
#pragma once

#include "../cells/math.h"

namespace fused_rnn {

// Of a loaded vector with two or three uses, GCC makes as many loads, each the operand of an instruction. A tile then
// waits for its loads, not for its multiply-adds.
template <class V>
FUSED_RNN_INLINE void keep_in_register(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

}  // namespace fused_rnn
