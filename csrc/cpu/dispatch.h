// Running a layer on the CPU: the instruction set chosen once, the threads chosen per call.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

// What the Python module, a library of its own, asks of this one; all else is hidden.
#define FUSED_RNN_EXPORT __attribute__((visibility("default")))

namespace fused_rnn {
namespace cpu {

// The implementation in use: the best that the processor and the operating system support, or the one that
// FUSED_RNN_CPU_ISA names. Throws std::runtime_error if that name is unknown or not supported here.
FUSED_RNN_EXPORT const Kernels& kernels();

// The implementations that run on this machine, best first.
FUSED_RNN_EXPORT std::vector<const Kernels*> supported();

// How a team works on a layer; see Worker.
struct Plan {
  int64_t teams;    // directions that run at the same time
  int64_t workers;  // threads of each team
  bool splits_units;
};
FUSED_RNN_EXPORT Plan plan(const LayerShape& shape, int64_t threads);

void forward(const ForwardParams& params, int64_t threads);

// The shape of the largest chunk of steps that backward takes at once: the gates' gradients of a long sequence are
// multiplied chunk by chunk, and need the memory of one.
LayerShape chunk_shape(const LayerShape& shape);
// The threads that share the products after a chunk; each needs a workspace.
int64_t gradient_workers(const LayerShape& shape, int64_t threads);
void backward(const BackwardParams& params, int64_t threads, int64_t gradient_workers);

}  // namespace cpu
}  // namespace fused_rnn
