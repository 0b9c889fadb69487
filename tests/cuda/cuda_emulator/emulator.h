// The functions of device.h for a host compiler: kernels run on the CPU, with every CUDA thread a fiber.
//
// The emulator is made to detect errors, not to be fast. It checks every access to shared memory for bounds and races,
// requires the threads of a warp, block or cluster to meet at the same operation, delays the words that blocks
// exchange, and varies the order in which threads run. If a kernel makes an error, run_emulated() throws
// std::runtime_error. Only load_exchanged() sees words in flight, so nothing else may read words of store_exchanged()
// before the launch ends.
#pragma once

#include <cstdint>
#include <cstring>

#include "launch.h"

#define FUSED_RNN_DEVICE inline
#define FUSED_RNN_KERNEL(threads) void
#define FUSED_RNN_UNROLL
#define FUSED_RNN_NO_UNROLL

namespace fused_rnn {
namespace cuda {

// For tests. The seed determines the order in which threads run and words arrive; the same seed repeats it.
void set_schedule_seed(uint64_t seed);
// How far nanoseconds() advances in one round, in which every thread has a turn. If all threads only wait, the clock
// runs faster and faster, so that a watchdog times out soon; without a watchdog, the launch fails as a deadlock.
void set_nanoseconds_per_round(uint64_t nanoseconds);
// Sets the result of current_device(), which is an H200 at first.
void set_current_device(const Device& device);

struct alignas(16) Words {
  uint32_t w[4];
};

int thread_index();
int block_index();
int block_count();
void sync_block();
void sync_warp();
float shuffle_xor(float value, int lanes);
uint32_t shuffle_xor(uint32_t value, int lanes);
template <class T>
void not_before(T&) {}

constexpr bool kHasClusters = true;
[[noreturn]] void trap();
void sync_cluster();
class Arrivals {
 public:
  explicit Arrivals(int offset) : offset_(offset) {}
  int offset() const { return offset_; }
  void init() const;
  void expect(int bytes) const;
  bool complete(int parity) const;

 private:
  int offset_;
};
void push(int offset, const Words& v, const Arrivals& arrivals, int rank);

Words load_exchanged(const void* from);
void store_exchanged(void* to, uint32_t word);
void reset_exchanged(void* to, uint32_t word);
void fence();
void relax();
uint64_t nanoseconds();
void store_to_host(int32_t* to, int32_t value);

void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

namespace emulation {

enum class Access { kRead, kWrite };

// The address of bytes of the running block's shared memory. Checks the access.
unsigned char* shared_bytes(int64_t offset, int bytes, int alignment, Access access);

// Replaces the T& of the GPU, whose accesses could not be checked. It can be used as a temporary only: a variable
// declared with `auto` would be a reference here, but a copy on the GPU.
template <class T>
class SharedValue {
  static_assert(sizeof(T) % 2 == 0, "races are tracked in units of two bytes");

 public:
  explicit SharedValue(int64_t offset) : offset_(offset) {}
  SharedValue(const SharedValue&) = delete;

  operator T() const&& { return read(); }
  void operator=(const T& value) && { write(value); }
  void operator=(SharedValue&& other) && { write(other.read()); }
  void operator+=(const T& value) && { write(read() + value); }

 private:
  T read() const {
    T value;
    std::memcpy(&value, shared_bytes(offset_, sizeof(T), alignof(T), Access::kRead), sizeof(T));
    return value;
  }
  void write(const T& value) const {
    std::memcpy(shared_bytes(offset_, sizeof(T), alignof(T), Access::kWrite), &value, sizeof(T));
  }

  int64_t offset_;
};

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace emulation

template <class T>
struct Shared {
  int offset;
  emulation::SharedValue<T> operator[](int i) const {
    return emulation::SharedValue<T>(offset + static_cast<int64_t>(i) * static_cast<int64_t>(sizeof(T)));
  }
};
template <class T>
Shared<T> shared_memory(int offset) {
  return {offset};
}

// Conversions round to nearest, ties to even (TF32: away from zero); every NaN becomes 0x7fff (TF32: 0x7fffffff).
inline uint16_t bf16_bits(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = emulation::same_bits<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline uint16_t fp16_bits(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = emulation::same_bits<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t size = bits & 0x7fffffff;
  uint32_t rounded;
  if (size >= 0x477ff000) {  // 65520, half way between the largest number and the next one if there were one
    rounded = 0x7c00;
  } else if (size < 0x38800000) {  // 2^-14: the last bit of size + 0.5 is 2^-24, the unit of subnormal fp16
    rounded = emulation::same_bits<uint32_t>(emulation::same_bits<float>(size) + 0.5f) - 0x3f000000;
  } else {
    rounded = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  }
  return static_cast<uint16_t>(sign | rounded);
}

inline uint32_t tf32_bits(float value) {
  if (value != value) return 0x7fffffff;
  return (emulation::same_bits<uint32_t>(value) + 0x1000) & 0xffffe000;
}

inline float from_bf16(uint16_t bits) { return emulation::same_bits<float>(static_cast<uint32_t>(bits) << 16); }

inline float from_fp16(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t size = bits & 0x7fffu;
  if (size > 0x7c00) return emulation::same_bits<float>(0x7fffffffu);
  if (size == 0x7c00) return emulation::same_bits<float>(sign | 0x7f800000u);
  const float scale = emulation::same_bits<float>((127u + 112u) << 23);  // the two formats' biases differ by 112
  const float value = emulation::same_bits<float>(size << 13) * scale;
  return sign != 0 ? -value : value;
}

}  // namespace cuda
}  // namespace fused_rnn
