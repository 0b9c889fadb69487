// What one instruction set offers: the table that its wrapper file fills and dispatch.cpp chooses from.
#pragma once

#include "../rnn_params.h"
#include "worker.h"

namespace fused_rnn {
namespace cpu {

struct Kernels {
  const char* name;
  // One worker's part of one direction (0, or 1 for the reverse one). These three count denormal numbers as zeros, and
  // leave the thread's own setting as it was: see denormals.h.
  void (*forward)(const ForwardParams& params, int64_t direction, const Worker& worker);
  void (*backward)(const BackwardParams& params, int64_t direction, const Worker& worker);
  // One worker's part of what is left after backward has run in every direction, on a chunk of steps.
  void (*gradients)(const BackwardParams& params, const Worker& worker);
  // Elements of workspace: of a direction, of a direction, of a worker.
  int64_t (*forward_workspace)(const LayerShape& shape);
  int64_t (*backward_workspace)(const LayerShape& shape);
  int64_t (*gradients_workspace)(const LayerShape& shape);
  // y[i] = f(x[i]) for the accuracy tests, denormal numbers included; `function` is 's'igmoid or 't'anh.
  void (*map_float)(char function, const float* x, float* y, int64_t n);
  void (*map_double)(char function, const double* x, double* y, int64_t n);
};

extern const Kernels kPortable;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace cpu
}  // namespace fused_rnn
