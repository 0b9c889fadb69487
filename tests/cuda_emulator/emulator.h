// The names of device.h for a host compiler: kernels run on the CPU, every CUDA thread a fiber of its own.
//
// The emulator is a judge more than a machine: it checks every access to shared memory for bounds and races, requires
// warps and blocks to meet at the same operation, delays what blocks exchange and varies the order in which threads
// run. What a kernel does wrong makes run_emulated() throw std::runtime_error. Words that are still on their way are
// seen by load_exchanged() only, so until the launch ends nothing else may read what store_exchanged() wrote.
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

// For tests. The seed decides in which order threads run and words arrive; a seed's launches can be repeated.
void set_schedule_seed(uint64_t seed);
// By how much nanoseconds() advances while every thread has its turn. A grid that only waits makes it run faster, so a
// watchdog ends such a grid soon; without a watchdog the launch ends as a deadlock.
void set_nanoseconds_per_round(uint64_t nanoseconds);
// What current_device() says from now on; initially an H200.
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
void push(int offset, uint32_t word, const Arrivals& arrivals, int rank);

Words load_exchanged(const void* from);
void store_exchanged(void* to, uint32_t word);
void relax();
uint64_t nanoseconds();
void store_to_host(int32_t* to, int32_t value);

void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

namespace emulation {

enum class Access { kRead, kWrite };

// Where bytes of the running block's shared memory lie, after all checks.
unsigned char* shared_bytes(int64_t offset, int bytes, int alignment, Access access);

// Stands for the T& of the GPU, which could not be checked. Not to be kept in a variable: the members refuse one,
// because `auto` would make it a reference here and a copy there.
template <class T>
class SharedValue {
  static_assert(sizeof(T) % 2 == 0, "races are tracked by two bytes");

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

// Rounded to nearest, ties to even (TF32: away from zero); NaN becomes the one NaN 0x7fff (0x7fffffff).
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
  if (size >= 0x477ff000) {  // 65520, half way between the largest number and what would be the next
    rounded = 0x7c00;
  } else if (size < 0x38800000) {  // 2^-14: the sum's last bit is 2^-24, the unit of fp16's subnormal numbers
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
