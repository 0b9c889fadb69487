// The table of kernels of one instruction set. Each isa_*.cpp defines one table; dispatch.cpp chooses among them.
#pragma once

#include "../rnn_params.h"
#include "tiles.h"
#include "worker.h"

namespace fused_rnn {
namespace cpu {

// One direction's weights in torch.nn's layout: float32, bfloat16, or int8 with a float32 scale for each row.
struct PlainDirection {
  const void *w_ih, *w_hh, *w_hr;               // [G*H, I], [G*H, P]; [P, H] or null
  const float *scale_ih, *scale_hh, *scale_hr;  // [G*H], [G*H], [P]; null unless int8
  const float *b_ih, *b_hh;                     // [G*H]; null: zeros
};

struct Kernels {
  const char* name;
  int vector_bytes;
  int unit_vectors;  // of a block of units with one gate; a block with several gates has one
  // Units of a block, the least that a worker of a team that splits units takes.
  int64_t block(int64_t gates, int64_t element) const {
    return (gates > 1 ? 1 : unit_vectors) * vector_bytes / element;
  }
  // The work of one worker in one direction (0, or 1 for the reverse one). All workers of the direction must call it.
  // These three functions treat denormal numbers as zeros, and restore the thread's own setting: see denormals.h.
  void (*forward)(const ForwardParams& params, int64_t direction, const Worker& worker);
  void (*backward)(const BackwardParams& params, int64_t direction, const Worker& worker);
  // The work of one worker on the gradients of inputs and weights, after `backward` has run in every direction on a
  // chunk of steps. The workers share no barrier.
  void (*gradients)(const BackwardParams& params, const Worker& worker);
  // Elements of the workspaces: for each direction, for each direction, for each worker.
  int64_t (*forward_workspace)(const LayerShape& shape);
  int64_t (*backward_workspace)(const LayerShape& shape);
  int64_t (*gradients_workspace)(const LayerShape& shape);
  // Packs weights for LayerShape::weights into `memory`, which is zeroed and 64-byte aligned, and sets the pointers to
  // weights and biases in `to`. Returns how many bytes that takes, and does nothing else if `memory` is null.
  int64_t (*freeze)(const LayerShape& shape, const PlainDirection& from, char* memory, ForwardDirection& to);
  // y[i] = f(x[i]) for the accuracy tests, denormal numbers included; `function` is 's' (sigmoid) or 't' (tanh).
  void (*map_float)(char function, const float* x, float* y, int64_t n);
  void (*map_double)(char function, const double* x, double* y, int64_t n);
  // What LayerShape::unit may be; null: this instruction set multiplies nothing narrower than float32.
  const TileUnit* unit = nullptr;

  // The same kernels with such a unit, as an instruction set of its own.
  Kernels with(const TileUnit& other) const {
    Kernels more = *this;
    more.name = other.name;
    more.unit = &other;
    return more;
  }
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace cpu
}  // namespace fused_rnn
