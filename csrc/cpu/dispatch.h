// Runs a layer on the CPU. The instruction set is the process's, unless a call names another; the number of threads is
// chosen for each call.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

// Marks the functions that the Python module calls. It is a library of its own; all other symbols are hidden.
#define FUSED_RNN_EXPORT __attribute__((visibility("default")))

namespace fused_rnn {
namespace cpu {

// The kernels in use: the best that the processor and the operating system support, or the ones that the environment
// variable FUSED_RNN_CPU_ISA names. Throws std::runtime_error if that name is unknown or not supported here.
FUSED_RNN_EXPORT const Kernels& kernels();

// The kernels that this machine can run; the first are the default.
FUSED_RNN_EXPORT std::vector<const Kernels*> supported();

// The kernels of a call: those at a place in supported(), or the ones in use for a negative place. Throws
// std::runtime_error if there is no such place. Both passes of a layer must use the same.
FUSED_RNN_EXPORT const Kernels& kernels(int64_t place);

// How accurately products of float32 are computed, as torch.set_float32_matmul_precision() says it.
enum class Precision : int32_t {
  kHighest,  // float32's own accuracy
  kHigh,     // at least TF32's
  kMedium,   // at least bfloat16's
};
constexpr int kPrecisions = 3;
// Sets shape.operands and shape.unit: whether to multiply float32 on tiles, and as what. To be called when all else of
// the shape is known, and before a workspace is asked for.
FUSED_RNN_EXPORT void choose_products(const Kernels& k, LayerShape& shape, Precision precision, int64_t threads);
// Takes digits back if one of a few rows of x [N, I] is too large for the weights in a few rows of w_ih [G*H, I]: such
// rows are left to float32 one by one, which is slow if there are many.
void reconsider_products(LayerShape& shape, const void* x, const void* w_ih);

// How threads share a layer; see Worker.
struct Plan {
  int64_t teams;    // directions that run at the same time
  int64_t workers;  // threads of each team
  bool splits_units;
};
FUSED_RNN_EXPORT Plan plan(const Kernels& k, const LayerShape& shape, bool backward, int64_t threads);

void forward(const Kernels& k, const ForwardParams& params, int64_t threads);

// The shape of the largest chunk of steps in backward. Backward splits a long sequence into chunks and multiplies the
// gate gradients of each before it goes on to the next, so that their buffers need only the size of one chunk.
LayerShape chunk_shape(const LayerShape& shape);
// How many threads share the products after each chunk; each needs a workspace.
int64_t gradient_workers(const LayerShape& shape, int64_t threads);
void backward(const Kernels& k, const BackwardParams& params, int64_t threads, int64_t gradient_workers);

}  // namespace cpu
}  // namespace fused_rnn
