// Kernel launches and device queries through the CUDA runtime.
#include <cuda_runtime.h>

#include <algorithm>
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
  cudaGetLastError();  // clears the error, or the next caller would see it
  throw std::runtime_error("fused_rnn: " + std::string(what) + ": " + cudaGetErrorString(status));
}

// Its attributes tell which architecture the library was compiled for.
__global__ void any_kernel() {}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

Device current_device() {
  static std::mutex mutex;
  static std::vector<Device> known;  // capability 0: not queried yet
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() <= static_cast<size_t>(device)) known.resize(device + 1, Device{0, 0, 0});
  Device& d = known[device];
  if (d.capability == 0) {
    d.sms = attribute(cudaDevAttrMultiProcessorCount, device);
    d.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaFuncAttributes compiled;
    check(cudaFuncGetAttributes(&compiled, any_kernel), "cudaFuncGetAttributes");
    d.capability = std::min(compiled.ptxVersion, 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                                                     attribute(cudaDevAttrComputeCapabilityMinor, device));
  }
  return d;
}

void launch_kernel(const void* kernel, const Grid& grid, void* stream, void* params) {
  if (grid.shared_bytes > 48 << 10) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes),
          "cudaFuncSetAttribute");
  }
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = grid.cooperative;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = grid.cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = grid.cluster > 1 ? 2 : 1;  // devices without clusters reject the cluster attribute
  void* arguments[] = {params};
  check(cudaLaunchKernelExC(&config, kernel, arguments), "cudaLaunchKernelExC");
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
