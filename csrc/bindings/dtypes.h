// The one list of dtypes that a layer's tensors may have; the CPU's kernels compute in the first two.
#pragma once

// X(torch's C++ name, torch's Python name)
#define FUSED_RNN_DTYPES(X) \
  X(Float, float32)         \
  X(Double, float64)        \
  X(BFloat16, bfloat16)     \
  X(Half, float16)
