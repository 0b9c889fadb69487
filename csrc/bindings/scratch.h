// The CPU operators' memory for the length of one call.
#pragma once

#include <cstdlib>
#include <utility>

#include "../cpu/memory.h"
#include "tensors.h"

namespace fused_rnn {
namespace bindings {

// Elements up to the end of the last cache line, of float32; of wider ones up to the end of a line, too.
inline int64_t whole_lines(int64_t elements) { return (elements + 15) / 16 * 16; }

// Memory for the length of one call. Little lies on the stack. What is more is kept for the thread's next call, up to
// kKept bytes: fresh memory from the system costs a page fault every 4 KB, for small layers more than the arithmetic.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes <= static_cast<int64_t>(sizeof(local_))) {
      data_ = local_;
    } else if (bytes <= kKept) {
      if (kept().size < bytes) kept() = Kept(bytes);
      data_ = kept().data;
    } else {
      heap_ = empty({(bytes + 3) / 4}, ScalarType::Float);  // torch aligns to 64 bytes, too
      data_ = static_cast<char*>(heap_->data_ptr());
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  char* data() const { return data_; }

 private:
  static constexpr int64_t kKept = 64 << 20;

  struct Kept {
    int64_t size = 0;
    char* data = nullptr;

    Kept() = default;
    explicit Kept(int64_t bytes) : size(bytes), data(cpu::allocate(bytes)) {
      FUSED_RNN_CHECK(data, "no memory for ", size, " bytes of scratch");
    }
    Kept& operator=(Kept&& other) noexcept {
      std::swap(size, other.size);
      std::swap(data, other.data);
      return *this;
    }
    ~Kept() { std::free(data); }
  };
  static Kept& kept() {
    static thread_local Kept of_thread;
    return of_thread;
  }

  alignas(64) char local_[8192];
  OptionalTensor heap_;
  char* data_;
};

}  // namespace bindings
}  // namespace fused_rnn
