// Memory in huge pages: for packed weights, which every step reads from end to end, for the workspace of a call, where
// they lie, and for what forward keeps for backward.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

namespace fused_rnn {
namespace cpu {

constexpr int64_t kHuge = 2 << 20;  // bytes of a huge page

// Asks for huge pages in memory that nothing was written to yet: they cost fewer misses of the TLB, and one page fault
// for 512. Where there are none, nothing changes.
inline void ask_for_huge_pages(void* memory, int64_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory), begin = (address + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (address + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// `bytes`, or a few more, to be freed with std::free; null if there is no memory.
inline char* allocate(int64_t bytes) {
  constexpr int64_t kLine = 64;
  const int64_t alignment = bytes >= kHuge ? kHuge : kLine, size = (bytes + alignment - 1) / alignment * alignment;
  char* const memory = static_cast<char*>(std::aligned_alloc(alignment, size));
  if (memory) ask_for_huge_pages(memory, size);
  return memory;
}

}  // namespace cpu
}  // namespace fused_rnn
