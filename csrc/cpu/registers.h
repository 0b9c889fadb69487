// Has the compiler keep a loaded vector in a register for all its uses.
#pragma once

#include "../cells/math.h"

namespace fused_rnn {

// GCC loads a vector with two or three uses again for each of them, as the operand of an instruction. A tile then waits
// for its loads instead of its multiply-adds.
template <class V>
FUSED_RNN_INLINE void keep_in_register(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

}  // namespace fused_rnn
