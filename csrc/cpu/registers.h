// Has the compiler keep a value in a scalar or vector register of its own.
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

// Loads a pointer by itself. GCC copies an array of pointers by vectors; if they have just been stored one by one, such
// a load waits until they are in the cache.
template <class T>
FUSED_RNN_INLINE void keep_in_register(T*& p) {
  asm("" : "+r"(p));
}

}  // namespace fused_rnn
