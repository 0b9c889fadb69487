// The kernels for x86-64 with AVX2 and FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define FUSED_RNN_ISA avx2
#define FUSED_RNN_TABLE kAvx2
#define FUSED_RNN_NAME "avx2"
#define FUSED_RNN_VEC_BYTES 32
#define FUSED_RNN_VECTOR_REGISTERS 16
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
