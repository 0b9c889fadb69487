// Checks csrc/cuda/launch.cu on a runtime without a GPU (fake_runtime/cuda_runtime.h): its calls, and how often.
#include <cuda_runtime.h>

#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "launch.h"
#include "plan.h"

namespace {

using namespace fused_rnn::cuda;
using fake::runtime;

int checks = 0, failures = 0;
void expect(bool holds, const char* what) {
  ++checks;
  if (holds) return;
  ++failures;
  std::printf("not so: %s\n", what);
}

const int kernels[3] = {};  // only their addresses count

void launch(int kernel, int shared_bytes) {
  launch_kernel(&kernels[kernel], {4, 256, shared_bytes, true}, nullptr, nullptr);
}

void check_allocation_in_a_capture() {
  runtime.capturing = true;
  int32_t* const of_first = error_word();
  runtime.capturing = false;
  expect(*of_first == 0, "the flag is cleared");
  expect(fake::mode == cudaStreamCaptureModeGlobal, "the thread's mode of capture is as before");
  fake::device = 1;
  int32_t* const of_second = error_word();
  expect(of_second != of_first && *of_second == 0, "each device has a flag");
  *of_second = 1;
  fake::device = 0;
  expect(*error_word() == 0, "an error on one device is none on another");
  expect(runtime.allocations == 1, "the flags are allocated once");
}

void check_clusters() {
  const Device d = current_device();
  expect(d.sms == 132 && d.shared_bytes == fake::kSharedBytes && d.capability == 90, "the device's properties");
  expect(d.clusters[1] == 132 && d.clusters[2] == 7 && d.clusters[5] == 2 && d.clusters[8] == 1, "resident clusters");
  expect(d.clusters[7] == 0, "a size that the runtime refuses has none");
  expect(runtime.set_limit == 1, "asking needs all shared memory for one kernel");

  // 96 units are six blocks of 16: two clusters of them run at once here, 16 by the estimate for an unknown device.
  Problem problem{fused_rnn::CellKind::kLstm, Element::kBf16, 1 << 10, 96, 1, false};
  int instances = 0;
  for (const Plan& p : plans(problem, d)) {
    if (p.instance.exchange != Exchange::kThroughCluster) continue;
    ++instances;
    expect(p.division.teams == d.clusters[p.division.parts], "the planner takes what the runtime has answered");
  }
  expect(instances > 0, "there are plans with clusters");
}

// Two threads launch one kernel with two sizes of shared memory. A limit set for each launch would be lowered by one
// thread before the other's launch.
void check_limit_of_shared_memory() {
  const int before = runtime.set_limit;
  launch(0, 48 << 10);
  expect(runtime.set_limit == before, "a kernel of up to 48 KiB needs no other limit");
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      fake::device = t % 2;
      for (int i = 0; i < 2000; ++i) launch(1 + i % 2, (t < 2 ? 50 : 200) << 10);
    });
  }
  for (std::thread& thread : threads) thread.join();
  // Two kernels on two devices, and once to ask the second device for its clusters.
  expect(runtime.set_limit == before + 2 * 2 + 1, "the limit is set once for each kernel and device");
  for (const auto& limit : runtime.limits) expect(limit.second == fake::kSharedBytes, "the limit is the device's");
  expect(runtime.launches == 1 + 4 * 2000 && runtime.refused == 0, "no launch is refused");
}

void check_errors() {
  try {
    launch(1, fake::kSharedBytes + 1);
    expect(false, "a launch that the runtime refuses is an error");
  } catch (const std::runtime_error& error) {
    expect(std::string(error.what()).find("cudaLaunchKernelExC") != std::string::npos, "the error names the call");
  }
}

}  // namespace

int main() {
  check_allocation_in_a_capture();
  check_clusters();
  check_limit_of_shared_memory();
  check_errors();
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
