// Kernel launches and device queries through the CUDA runtime.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "launch.h"

namespace fused_rnn {
namespace cuda {

namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears the error, or the next caller would see it
  throw std::runtime_error("fused_rnn: " + std::string(what) + ": " + cudaGetErrorString(status));
}

// Tells which architecture the library was compiled for, and how many blocks like those of the resident kernels run at
// the same time.
__global__ void any_kernel() {}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

int device_index() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// Lets a kernel have all the shared memory of a block, once for each kernel and device. A limit of each launch's own
// size could be lowered by another thread between the call that sets it and the launch.
void allow_shared_memory(const void* kernel, int device, int bytes) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
  allowed.insert({kernel, device});
}

// The launch of a grid; `attributes` holds two, for as long as the result is used.
cudaLaunchConfig_t configuration(const Grid& grid, cudaStream_t stream, cudaLaunchAttribute* attributes) {
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = grid.cooperative;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = grid.cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = grid.cluster > 1 ? 2 : 1;  // devices without clusters reject the cluster attribute
  return config;
}

// How many clusters of so many blocks run at the same time, each block on a multiprocessor of its own: all of its
// shared memory keeps others away. 0 if the device has no such clusters.
int resident_clusters(int blocks, const Device& d) {
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = configuration({blocks, 256, d.shared_bytes, false, blocks}, nullptr, attributes);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, any_kernel, &config) == cudaSuccess) return clusters;
  cudaGetLastError();
  return 0;
}

Device asked(int device) {
  Device d{attribute(cudaDevAttrMultiProcessorCount, device),
           attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device), 0};
  cudaFuncAttributes compiled;
  check(cudaFuncGetAttributes(&compiled, any_kernel), "cudaFuncGetAttributes");
  d.capability = std::min(compiled.ptxVersion, 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                                                   attribute(cudaDevAttrComputeCapabilityMinor, device));
  d.clusters[1] = d.sms;
  if (d.capability >= 90) {
    allow_shared_memory(reinterpret_cast<const void*>(any_kernel), device, d.shared_bytes);
    for (int blocks = 2; blocks <= kMaxClusterBlocks; ++blocks) d.clusters[blocks] = resident_clusters(blocks, d);
  }
  return d;
}

}  // namespace

Device current_device() {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const int device = device_index();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known[device] = asked(device);
}

void launch_kernel(const void* kernel, const Grid& grid, void* stream, void* params) {
  if (grid.shared_bytes > 48 << 10) allow_shared_memory(kernel, device_index(), current_device().shared_bytes);
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = configuration(grid, static_cast<cudaStream_t>(stream), attributes);
  void* arguments[] = {params};
  check(cudaLaunchKernelExC(&config, kernel, arguments), "cudaLaunchKernelExC");
}

void fill_with_ones(void* at, int64_t bytes, void* stream) {
  check(cudaMemsetAsync(at, 0xff, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

int32_t* error_word() {
  static int32_t* const words = [] {
    int devices = 0;
    check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
    // While a CUDA graph is captured, a thread may allocate only in this mode.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
    void* memory = nullptr;
    const size_t bytes = devices * sizeof(int32_t);
    const cudaError_t status = cudaHostAlloc(&memory, bytes, cudaHostAllocPortable | cudaHostAllocMapped);
    cudaThreadExchangeStreamCaptureMode(&mode);
    check(status, "cudaHostAlloc");
    std::memset(memory, 0, bytes);
    return static_cast<int32_t*>(memory);
  }();
  return words + device_index();
}

}  // namespace cuda
}  // namespace fused_rnn
