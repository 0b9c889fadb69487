// What the host asks of the CUDA runtime, so that no other file includes it; the emulator offers the same.
#pragma once

#include <cstdint>

#if defined(FUSED_RNN_EMULATOR)
#include <functional>
#endif

namespace fused_rnn {
namespace cuda {

struct Grid {
  int blocks, threads;
  int shared_bytes;
  bool cooperative;  // blocks wait for each other: all must run at the same time
  int cluster = 1;   // so many neighbouring blocks run at the same time and reach each other's shared memory
};

struct Device {
  int sms;
  int shared_bytes;  // that one block may have
  int capability;    // 10 * major + minor; what the kernels were compiled for, if that is less
};

// Of the current device; cached.
Device current_device();

// Starts `kernel(params)` on `stream` of the current device. Throws std::runtime_error if the device refuses.
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

// Sets all bits of `bytes` bytes of the current device's memory, on `stream`.
void fill_with_ones(void* at, int64_t bytes, void* stream);

// A word of host memory that kernels of the current device can write: not 0 after a watchdog has ended a kernel.
int32_t* error_word();

}  // namespace cuda
}  // namespace fused_rnn
