// The GPU's special instructions as functions, so that the kernels contain no PTX.
//
// nvcc compiles the definitions below. tests/cuda/cuda_emulator defines the same names for g++, with every CUDA thread
// a fiber on the CPU, so that the kernels can be tested without a GPU.
#pragma once

#include <cstdint>

#include "../cells/math.h"

#if defined(FUSED_RNN_EMULATOR)
#include "emulator.h"
#else

#define FUSED_RNN_DEVICE __device__ __forceinline__
#define FUSED_RNN_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define FUSED_RNN_UNROLL _Pragma("unroll")
#define FUSED_RNN_NO_UNROLL _Pragma("unroll 1")

namespace fused_rnn {
namespace cuda {

struct alignas(16) Words {  // the widest load or store
  uint32_t w[4];
};

FUSED_RNN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FUSED_RNN_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
FUSED_RNN_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
FUSED_RNN_DEVICE void sync_block() { __syncthreads(); }
FUSED_RNN_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
FUSED_RNN_DEVICE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// The compiler may use the value from here on only. Otherwise it converts a value right behind its load.
FUSED_RNN_DEVICE void not_before(uint16_t& value) { asm volatile("" : "+h"(value)); }
FUSED_RNN_DEVICE void not_before(float& value) { asm volatile("" : "+f"(value)); }

// An array in the block's shared memory.
template <class T>
struct Shared {
  T* at;
  FUSED_RNN_DEVICE T& operator[](int i) const { return at[i]; }
};
// The array that begins at a byte offset.
template <class T>
FUSED_RNN_DEVICE Shared<T> shared_memory(int offset) {
  extern __shared__ __align__(128) unsigned char bytes[];
  return {reinterpret_cast<T*>(bytes + offset)};
}

// Clusters are groups of neighbouring blocks that can access each other's shared memory. They exist from sm_90 on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#define FUSED_RNN_CLUSTER_ASM(...) __trap()
#else
constexpr bool kHasClusters = true;
#define FUSED_RNN_CLUSTER_ASM(...) asm volatile(__VA_ARGS__)
#endif
// Aborts the kernel.
FUSED_RNN_DEVICE void trap() { __trap(); }

// A barrier of all threads of the cluster. Memory accesses before it are visible to all of them after it.
FUSED_RNN_DEVICE void sync_cluster() {
  FUSED_RNN_CLUSTER_ASM("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" :: : "memory");
}

FUSED_RNN_DEVICE uint32_t shared_address(int offset) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(&shared_memory<unsigned char>(offset)[0]));
}

// An mbarrier: eight bytes of shared memory that count the bytes which other blocks push here. A phase ends when one
// thread has declared the number of its bytes with `expect` and all of them have arrived, in either order.
class Arrivals {
 public:
  FUSED_RNN_DEVICE explicit Arrivals(int offset) : offset_(offset) {}
  FUSED_RNN_DEVICE int offset() const { return offset_; }
  // Called by one thread; the others may use the barrier after a sync_cluster.
  FUSED_RNN_DEVICE void init() const {
    FUSED_RNN_CLUSTER_ASM("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(
        shared_address(offset_)) : "memory");
  }
  // Called by one thread, once in every phase.
  FUSED_RNN_DEVICE void expect(int bytes) const {
    FUSED_RNN_CLUSTER_ASM("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(offset_)),
                          "r"(bytes) : "memory");
  }
  // Whether the current phase has ended, where parity is 0 for the first, third, ... phase and 1 for the others; the
  // caller must not be more than one phase behind. May wait for a short time. If true, the pushed bytes of the phase
  // are visible to the caller.
  FUSED_RNN_DEVICE bool complete(int parity) const {
    uint32_t done = 0;
    FUSED_RNN_CLUSTER_ASM(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(shared_address(offset_)),
        "r"(parity) : "memory");
    return done != 0;
  }

 private:
  int offset_;
};

// Stores words asynchronously in the shared memory of the cluster's block `rank`, at the same offset as in this block.
// That block's `arrivals` counts them after they are stored. No other memory access is ordered.
FUSED_RNN_DEVICE void push(int offset, const Words& v, const Arrivals& arrivals, int rank) {
  FUSED_RNN_CLUSTER_ASM(
      "{\n.reg .b32 to, at;\n"
      "mapa.shared::cluster.u32 to, %0, %6;\n"
      "mapa.shared::cluster.u32 at, %5, %6;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%1, %2, %3, %4}, [at];\n}" ::"r"(
          shared_address(offset)),
      "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3]), "r"(shared_address(arrivals.offset())), "r"(rank) : "memory");
}
#undef FUSED_RNN_CLUSTER_ASM

// Loads and stores of words that blocks exchange through the L2 cache. A word is read either whole or not at all; the
// words are not ordered with each other or with other memory accesses.
FUSED_RNN_DEVICE Words load_exchanged(const void* from) {
  Words v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(from)
               : "memory");
  return v;
}
FUSED_RNN_DEVICE void store_exchanged(void* to, uint32_t word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}
// Stores the word four times. In the emulator a reader may see the old words until the author, and after it the reader,
// has executed a fence().
FUSED_RNN_DEVICE void reset_exchanged(void* to, uint32_t word) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %1, %1, %1};" ::"l"(to), "r"(word) : "memory");
}
// Orders the calling thread's memory accesses before it and behind it, for threads that learn of it from exchanged
// words and execute a fence, too.
FUSED_RNN_DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// Called in every iteration of a waiting loop; the emulator lets other threads run.
FUSED_RNN_DEVICE void relax() {}
// A clock that all multiprocessors share.
FUSED_RNN_DEVICE uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}
// Stores to host memory that the CPU may read while the kernel runs.
FUSED_RNN_DEVICE void store_to_host(int32_t* to, int32_t value) {
  asm volatile("st.relaxed.sys.global.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// c += a * b^T on the tensor cores, executed by a whole warp. a has 16 rows and b has 8 rows of 16 (bf16, fp16) or 8
// (TF32) columns; c is [16, 8]. Lane l holds words of rows l / 4 (a[0], a[2]) and l / 4 + 8 (a[1], a[3]) of a, and of
// row l / 4 of b (b0, b1); the first word of each pair is from the first half of the columns, the second from the
// second half. Of c it holds columns 2 (l % 4) and 2 (l % 4) + 1 of the same rows as of a.
#define FUSED_RNN_MMA(name, shape, types)                                                                            \
  FUSED_RNN_DEVICE void name(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {                      \
    asm("mma.sync.aligned." shape ".row.col.f32." types ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                             \
  }
FUSED_RNN_MMA(mma_bf16, "m16n8k16", "bf16.bf16")
FUSED_RNN_MMA(mma_fp16, "m16n8k16", "f16.f16")
FUSED_RNN_MMA(mma_tf32, "m16n8k8", "tf32.tf32")
#undef FUSED_RNN_MMA

// Conversions round to nearest. Every NaN becomes 0x7fff (TF32: 0x7fffffff), so that no result has all bits set; see
// kNotReady.
FUSED_RNN_DEVICE uint16_t bf16_bits(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
FUSED_RNN_DEVICE uint16_t fp16_bits(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
FUSED_RNN_DEVICE uint32_t tf32_bits(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return value != value ? 0x7fffffffu : bits;
}
FUSED_RNN_DEVICE float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
FUSED_RNN_DEVICE float from_fp16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

}  // namespace cuda

namespace math {
template <>
struct Extremes<float> {  // one instruction each
  FUSED_RNN_DEVICE static float larger(float a, float b) {
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(a) : "f"(a), "f"(b));
    return a;
  }
  FUSED_RNN_DEVICE static float smaller(float a, float b) {
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(a) : "f"(a), "f"(b));
    return a;
  }
};
template <>
struct Quotient<float> {
  // At most 1.5 ulp; 0 where 1 / b is subnormal.
  FUSED_RNN_DEVICE static float of(float a, float b) { return a * inverse(b); }
  FUSED_RNN_DEVICE static float of(float a, float b, float lost) {
    const float i = inverse(b), quotient = a * i;
    return quotient - quotient * lost * i;
  }

 private:
  FUSED_RNN_DEVICE static float inverse(float b) {
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(b) : "f"(b));
    return b;
  }
};
}  // namespace math
}  // namespace fused_rnn

#endif
