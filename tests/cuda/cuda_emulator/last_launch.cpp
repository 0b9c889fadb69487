// Asked by Python's tests: which kernels an operator has run.
#include "machine.h"

// The shared memory of a block of the last launch. Resident kernels hold a layer's tile there, some kilobytes at least;
// the others nothing, or a few sums.
extern "C" int fused_rnn_emulated_shared_bytes() { return fused_rnn::cuda::emulation::emulator().grid().shared_bytes; }
