// Memory for packed weights, which every step reads from end to end, and for the workspace of a call, where they lie.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

namespace fused_rnn {
namespace cpu {

// `bytes`, or a few more, to be freed with std::free; null if there is no memory. Many are asked for in huge pages,
// which cost fewer misses of the TLB; where there are none, nothing changes.
inline char* allocate(int64_t bytes) {
  constexpr int64_t kHuge = 2 << 20, kLine = 64;
  const int64_t alignment = bytes >= kHuge ? kHuge : kLine, size = (bytes + alignment - 1) / alignment * alignment;
  char* const memory = static_cast<char*>(std::aligned_alloc(alignment, size));
  if (memory && bytes >= kHuge) madvise(memory, size, MADV_HUGEPAGE);
  return memory;
}

}  // namespace cpu
}  // namespace fused_rnn
