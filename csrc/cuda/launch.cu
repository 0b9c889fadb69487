#include <cuda_runtime.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"

namespace fused_rnn {
namespace cuda {

namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next caller would find it
  throw std::runtime_error("fused_rnn: " + std::string(what) + ": " + cudaGetErrorString(status));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

Device current_device() {
  static std::mutex mutex;
  static std::vector<Device> known;  // capability 0: not asked yet
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() <= static_cast<size_t>(device)) known.resize(device + 1, Device{0, 0, 0});
  Device& d = known[device];
  if (d.capability == 0) {
    d.sms = attribute(cudaDevAttrMultiProcessorCount, device);
    d.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    d.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                   attribute(cudaDevAttrComputeCapabilityMinor, device);
  }
  return d;
}

void launch_kernel(const void* kernel, const Grid& grid, void* stream, void* params) {
  if (grid.shared_bytes > 48 << 10) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes),
          "cudaFuncSetAttribute");
  }
  void* arguments[] = {params};
  const dim3 blocks(grid.blocks), threads(grid.threads);
  const auto on = static_cast<cudaStream_t>(stream);
  if (grid.cooperative) {
    check(cudaLaunchCooperativeKernel(kernel, blocks, threads, arguments, grid.shared_bytes, on),
          "cudaLaunchCooperativeKernel");
  } else {
    check(cudaLaunchKernel(kernel, blocks, threads, arguments, grid.shared_bytes, on), "cudaLaunchKernel");
  }
}

void fill_with_ones(void* at, int64_t bytes, void* stream) {
  check(cudaMemsetAsync(at, 0xff, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

int32_t* error_word() {
  static int32_t* const word = [] {
    void* memory = nullptr;
    check(cudaHostAlloc(&memory, sizeof(int32_t), cudaHostAllocPortable | cudaHostAllocMapped), "cudaHostAlloc");
    *static_cast<int32_t*>(memory) = 0;
    return static_cast<int32_t*>(memory);
  }();
  return word;
}

}  // namespace cuda
}  // namespace fused_rnn
