// The functions of the CUDA runtime that the host code needs. launch.cu implements them for the GPU and the emulator
// for the CPU, so that no other file includes the runtime.
#pragma once

#include <cstdint>

#include "layout.h"

#if defined(FUSED_RNN_EMULATOR)
#include <functional>
#endif

namespace fused_rnn {
namespace cuda {

struct Grid {
  int blocks, threads;
  int shared_bytes;
  bool cooperative;  // all blocks must run at the same time, because they wait for each other
  int cluster = 1;   // blocks per cluster; they run at the same time and access each other's shared memory
};

struct Device {
  int sms;           // multiprocessors
  int shared_bytes;  // maximum for one block
  int capability;    // 10 * major + minor of the device, or of the compiled kernels if that is lower
  // [n]: how many clusters of n blocks run at the same time, one block on each multiprocessor. [1] is 0 if the runtime
  // was not asked, because the device is not in this machine.
  int clusters[kMaxClusterBlocks + 1] = {};
};

// The properties of the current device; cached.
Device current_device();

// Starts kernel(params) on `stream` of the current device. Throws std::runtime_error if the launch fails.
#if defined(FUSED_RNN_EMULATOR)
void run_emulated(const Grid& grid, const std::function<void()>& kernel);

template <class Params>
void launch(void (*kernel)(Params), const Grid& grid, void*, const Params& params) {
  run_emulated(grid, [&] { kernel(params); });
}
#else
void launch_kernel(const void* kernel, const Grid& grid, void* stream, void* params);

template <class Params>
void launch(void (*kernel)(Params), const Grid& grid, void* stream, Params params) {
  launch_kernel(reinterpret_cast<const void*>(kernel), grid, stream, &params);
}
#endif

// Sets all bits of `bytes` bytes of device memory at `at`, asynchronously on `stream`.
void fill_with_ones(void* at, int64_t bytes, void* stream);

// The error flag of the current device: a word of host memory that kernels can write. It becomes 1 when a kernel's
// watchdog times out; the reader resets it.
int32_t* error_word();

}  // namespace cuda
}  // namespace fused_rnn
