// The kernels for x86-64 with AVX-512 F, VL, DQ and BW.
#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,fma")
#endif
#define FUSED_RNN_ISA avx512
#define FUSED_RNN_TABLE kAvx512
#define FUSED_RNN_NAME "avx512"
#define FUSED_RNN_VEC_BYTES 64
#define FUSED_RNN_VECTOR_REGISTERS 32
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
