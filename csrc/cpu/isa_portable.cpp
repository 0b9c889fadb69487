// The kernels for any machine: 16-byte vectors (SSE2 on x86-64, NEON on 64-bit Arm).
#define FUSED_RNN_ISA portable
#define FUSED_RNN_TABLE kPortable
#define FUSED_RNN_NAME "portable"
#define FUSED_RNN_VEC_BYTES 16
#if defined(__aarch64__)
#define FUSED_RNN_VECTOR_REGISTERS 32
#else
#define FUSED_RNN_VECTOR_REGISTERS 16
#endif
#include "kernels.inc"
