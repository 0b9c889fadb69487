// Intel's Advanced Matrix Extensions: tdpbf16ps and tdpbssd, as inline assembly. So no compiler has to know AMX, the
// tile numbers can be template arguments, and this file needs no flags; the assembler must know AMX (binutils 2.35).
//
// Linux lends the tile registers to a process on request, once, and its threads and forked children inherit the
// permission; without it the first tile instruction ends the process by SIGILL. It is asked for before the first
// product and not earlier, because a process that holds it needs larger signal stacks.
#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>

#include "tile_products.h"

namespace fused_rnn {
namespace cpu {

namespace {

bool available() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

// The operand of ldtilecfg.
struct alignas(64) Configuration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(Configuration) == 64, "as the processor defines it");

class Tiles {
 public:
  explicit Tiles(TileState& state) : state_(state) {}

  void configure(int rows, int first_b) {
    const bool same = rows == kTileHeight ? state_.rows == rows : state_.rows == rows && state_.first_b == first_b;
    if (same) return;
    state_ = {rows, first_b};
    Configuration of;
    for (int t = 0; t < 8; ++t) {
      of.row_bytes[t] = kTileBytes;
      of.rows[t] = static_cast<uint8_t>(t < first_b ? rows : kTileHeight);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(of));
  }
  template <int t>
  void load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  void store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(t));
  }
  template <int c, int a, int b>
  void dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
  template <int c, int a, int b>
  void dot_digits() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }

 private:
  TileState& state_;
};

void multiply(const Bf16Product& product, TileState& state) {
  Tiles tiles(state);
  multiply_tiles(tiles, product);
}

void multiply_digits(const DigitProduct& product, TileState& state) {
  Tiles tiles(state);
  multiply_tile(tiles, product);
}

void release(TileState& state) {
  if (state.rows) __asm__ volatile("tilerelease");
  state = {};
}

}  // namespace

const TileUnit kAmxTiles = {"amx", available, multiply, multiply_digits, release};

}  // namespace cpu
}  // namespace fused_rnn
#endif
