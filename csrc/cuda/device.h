// Everything that a kernel asks of the GPU, each instruction behind a name. No kernel contains PTX.
//
// One source, two targets: nvcc compiles what is below; tests/cuda_emulator offers the same names to g++, where every
// CUDA thread is a fiber on the CPU, and so proves the kernels without a GPU.
#pragma once

#include <cstdint>

#if defined(FUSED_RNN_EMULATOR)
#include "emulator.h"
#else

#define FUSED_RNN_DEVICE __device__ __forceinline__
#define FUSED_RNN_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define FUSED_RNN_UNROLL _Pragma("unroll")
#define FUSED_RNN_NO_UNROLL _Pragma("unroll 1")

namespace fused_rnn {
namespace cuda {

struct alignas(16) Words {  // what one load or store moves at most
  uint32_t w[4];
};

FUSED_RNN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FUSED_RNN_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
FUSED_RNN_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
FUSED_RNN_DEVICE void sync_block() { __syncthreads(); }
FUSED_RNN_DEVICE void sync_warp() { __syncwarp(); }
FUSED_RNN_DEVICE float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

// The block's shared memory from a byte offset on.
template <class T>
struct Shared {
  T* at;
  FUSED_RNN_DEVICE T& operator[](int i) const { return at[i]; }
};
template <class T>
FUSED_RNN_DEVICE Shared<T> shared_memory(int offset) {
  extern __shared__ __align__(128) unsigned char bytes[];
  return {reinterpret_cast<T*>(bytes + offset)};
}

// Clusters: neighbouring blocks that reach each other's shared memory. Below sm_90 there are none.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#define FUSED_RNN_OF_CLUSTERS(...) __trap()
#else
constexpr bool kHasClusters = true;
#define FUSED_RNN_OF_CLUSTERS(...) asm volatile(__VA_ARGS__)
#endif
FUSED_RNN_DEVICE void trap() { __trap(); }

// Waits for all threads of the cluster; each then sees what the others have done before.
FUSED_RNN_DEVICE void sync_cluster() {
  FUSED_RNN_OF_CLUSTERS("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" :: : "memory");
}

FUSED_RNN_DEVICE uint32_t shared_address(int offset) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(&shared_memory<unsigned char>(offset)[0]));
}

// Eight bytes of shared memory that count the bytes which others push here. A phase ends when one thread has said, with
// `expect`, how many are to come in it, and they have come; before or after, that does not matter.
class Arrivals {
 public:
  FUSED_RNN_DEVICE explicit Arrivals(int offset) : offset_(offset) {}
  FUSED_RNN_DEVICE int offset() const { return offset_; }
  // By one thread, before a sync_cluster.
  FUSED_RNN_DEVICE void init() const {
    FUSED_RNN_OF_CLUSTERS("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(
        shared_address(offset_)) : "memory");
  }
  // Once in every phase.
  FUSED_RNN_DEVICE void expect(int bytes) const {
    FUSED_RNN_OF_CLUSTERS("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(offset_)),
                          "r"(bytes) : "memory");
  }
  // Whether a phase has ended: the first and every second (parity 0), or those between (1). The caller is never more
  // than one phase behind. Waits a moment, but not for long. Then the caller sees what has come in that phase.
  FUSED_RNN_DEVICE bool complete(int parity) const {
    uint32_t done = 0;
    FUSED_RNN_OF_CLUSTERS(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(shared_address(offset_)),
        "r"(parity) : "memory");
    return done != 0;
  }

 private:
  int offset_;
};

// Stores a word in the shared memory of the cluster's block `rank`, at the offset at which this block has its own, and
// has it counted by that block's `arrivals`. Orders nothing but the word before its being counted.
FUSED_RNN_DEVICE void push(int offset, uint32_t word, const Arrivals& arrivals, int rank) {
  FUSED_RNN_OF_CLUSTERS(
      "{\n.reg .b32 to, at;\n"
      "mapa.shared::cluster.u32 to, %0, %3;\n"
      "mapa.shared::cluster.u32 at, %2, %3;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %1, [at];\n}" ::"r"(shared_address(offset)),
      "r"(word), "r"(shared_address(arrivals.offset())), "r"(rank) : "memory");
}
#undef FUSED_RNN_OF_CLUSTERS

// Words that blocks exchange through the L2 cache: each is whole or not there at all; nothing orders them.
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
// One turn of a waiting loop.
FUSED_RNN_DEVICE void relax() {}
FUSED_RNN_DEVICE uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}
// To memory that the host reads while the kernel runs.
FUSED_RNN_DEVICE void store_to_host(int32_t* to, int32_t value) {
  asm volatile("st.relaxed.sys.global.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// sums += a * b on the tensor cores, a warp together: a is 16 rows of 16 (bf16, fp16) or 8 (TF32) columns, b the same
// columns of 8 rows. Lane l holds words of rows l / 4 (a[0], a[2]) and l / 4 + 8 (a[1], a[3]) of a and of row l / 4 of
// b: first columns of the first half, then those of the second. Sums: rows as a, columns 2 (l % 4) and 2 (l % 4) + 1.
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

// Rounded to nearest; NaN becomes the one NaN 0x7fff (0x7fffffff), never all ones.
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
}  // namespace fused_rnn

#endif
