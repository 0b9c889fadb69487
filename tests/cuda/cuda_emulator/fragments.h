// The operations that the lanes of a warp compute together: mma and shuffles. One lane computes them for all.
//
// The assignment of matrix elements to lanes is that of the PTX manual ("Matrix Fragments for mma.m16n8k16" and
// ".m16n8k8"), so that a kernel that gives a lane the wrong elements gets a wrong product here, too. Sums are rounded
// to float32 after every addition, in the order of k; the order and rounding of the GPU are not documented.
#pragma once

#include <cstdint>

#include "emulator.h"

namespace fused_rnn {
namespace cuda {
namespace emulation {

constexpr int kLanes = 32;

struct Operands {  // of one lane
  float* c;        // the sums (shuffle: the value), replaced by the result
  uint32_t a[4];   // shuffle: a[0] is the mask
  uint32_t b[2];
};

// The value of element `number` of a register, which holds two elements of the 16-bit types. TF32 reads the upper 19
// bits.
inline float tf32_number(uint32_t bits, int) { return same_bits<float>(bits & 0xffffe000u); }
inline float bf16_number(uint32_t bits, int number) { return from_bf16(static_cast<uint16_t>(bits >> 16 * number)); }
inline float fp16_number(uint32_t bits, int number) { return from_fp16(static_cast<uint16_t>(bits >> 16 * number)); }

typedef float Four __attribute__((vector_size(16)));  // four neighbouring columns

// sums += a * b; a is 16 rows of k, b is 8 columns of k, a register holds kPacked consecutive k.
template <int kPacked, float (*number)(uint32_t, int)>
void multiply(const Operands (&lanes)[kLanes]) {
  constexpr int kDepth = 8 * kPacked;
  float a[16][kDepth];
  Four b[kDepth][2], c[16][2];  // b is indexed by k first, so that all columns are summed together
  for (int lane = 0; lane < kLanes; ++lane) {
    const Operands& own = lanes[lane];
    const int group = lane / 4, place = lane % 4;
    const int column = 2 * place;
    for (int i = 0; i < 4; ++i) {
      c[group + i / 2 * 8][column / 4][column % 4 + i % 2] = own.c[i];
      for (int n = 0; n < kPacked; ++n) {
        a[group + i % 2 * 8][kPacked * (place + i / 2 * 4) + n] = number(own.a[i], n);
        if (i < 2) b[kPacked * (place + i * 4) + n][group / 4][group % 4] = number(own.b[i], n);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    Four left = c[row][0], right = c[row][1];
    for (int k = 0; k < kDepth; ++k) {
      left += a[row][k] * b[k][0];
      right += a[row][k] * b[k][1];
    }
    c[row][0] = left;
    c[row][1] = right;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) lanes[lane].c[i] = c[lane / 4 + i / 2 * 8][column / 4][column % 4 + i % 2];
  }
}

// Each lane's value becomes that of the lane whose number differs in the bits of the mask.
inline void shuffle(const Operands (&lanes)[kLanes]) {
  float values[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) values[lane] = *lanes[lane].c;
  for (int lane = 0; lane < kLanes; ++lane) *lanes[lane].c = values[(lane ^ lanes[lane].a[0]) % kLanes];
}

}  // namespace emulation
}  // namespace cuda
}  // namespace fused_rnn
