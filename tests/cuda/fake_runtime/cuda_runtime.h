// A CUDA runtime without a GPU: what csrc/cuda/launch.cu calls, with the values of a made-up machine. g++ compiles it,
// and launch_check.cpp sees every call.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#define __global__

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue = 1, cudaErrorStreamCaptureUnsupported = 900 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative, cudaLaunchAttributeClusterDimension };
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
constexpr unsigned cudaHostAllocPortable = 1, cudaHostAllocMapped = 2;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaFuncAttributes {
  int ptxVersion;
};
using cudaStream_t = struct FakeStream*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace fake {

constexpr int kDevices = 2, kSharedBytes = 232448;

// The state of the runtime, and how often it was called.
struct Runtime {
  std::mutex mutex;
  std::map<std::pair<const void*, int>, int> limits;  // of dynamic shared memory, by kernel and device
  int set_limit = 0, launches = 0, refused = 0, allocations = 0;
  bool capturing = false;  // another thread captures a CUDA graph
  int capability = 90;
};
inline Runtime runtime;
inline thread_local int device = 0;
inline thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

inline unsigned cluster(const cudaLaunchConfig_t* config) {
  return config->numAttrs == 2 ? config->attrs[1].val.clusterDim.x : 1;
}
// Whether the kernel may have so much shared memory here; the mutex is held.
inline bool fits(const void* kernel, size_t bytes) {
  const auto limit = runtime.limits.find({kernel, device});
  return bytes <= (limit == runtime.limits.end() ? 49152u : static_cast<size_t>(limit->second));
}

}  // namespace fake

inline const char* cudaGetErrorString(cudaError_t) { return "an error of the fake runtime"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = fake::device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = fake::kDevices;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const int values[] = {132, fake::kSharedBytes, fake::runtime.capability / 10, fake::runtime.capability % 10};
  *value = values[which];
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  const std::lock_guard<std::mutex> lock(fake::runtime.mutex);
  fake::runtime.set_limit += 1;
  fake::runtime.limits[{kernel, fake::device}] = bytes;
  return cudaSuccess;
}
// A machine with room for seven clusters of two blocks, and so on, none of seven blocks; twice as many of small blocks.
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel* kernel, const cudaLaunchConfig_t* config) {
  const std::lock_guard<std::mutex> lock(fake::runtime.mutex);
  if (fake::cluster(config) == 7 || !fake::fits(reinterpret_cast<const void*>(kernel), config->dynamicSmemBytes)) {
    return cudaErrorInvalidValue;
  }
  *count = static_cast<int>(14 / fake::cluster(config)) * (config->dynamicSmemBytes > fake::kSharedBytes / 2 ? 1 : 2);
  return cudaSuccess;
}
inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  const std::lock_guard<std::mutex> lock(fake::runtime.mutex);
  fake::runtime.launches += 1;
  if (fake::fits(kernel, config->dynamicSmemBytes)) return cudaSuccess;
  fake::runtime.refused += 1;
  return cudaErrorInvalidValue;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, fake::mode);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  if (fake::runtime.capturing && fake::mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
  fake::runtime.allocations += 1;
  *memory = std::malloc(bytes);
  std::memset(*memory, 0xff, bytes);
  return cudaSuccess;
}
