// The reference of cuda_check.cpp: the operands of a layer in guarded memory, and a plain loop in double precision.
//
// The reference rounds values where the contract (csrc/cuda/params.h) says that they are stored or exchanged, so that
// its results differ from the kernels' by little more than float32's rounding errors. It does not use tiles, parts,
// warps or launches.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "element.h"
#include "instances.cuh"

namespace fused_rnn {
namespace cuda {
namespace check {

using Values = std::vector<double>;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kUntouched =
    std::numeric_limits<double>::infinity();  // expected value of elements that a kernel must not write

// ---- Numbers and memory ---------------------------------------------------------------------------------------------

inline double as_stored(Element e, double v) {
  const float value = static_cast<float>(v);
  return e == Element::kBf16 ? from_bf16(bf16_bits(value)) : e == Element::kFp16 ? from_fp16(fp16_bits(value)) : value;
}
inline double as_exchanged(Element e, double v) {
  return e == Element::kTf32 ? math::bits<float>(tf32_bits(static_cast<float>(v))) : as_stored(e, v);
}

// An array of elements for a kernel, filled with `fill` (a NaN) and surrounded by guards. Under the address sanitizer
// it has no guards, so that the sanitizer reports any access outside. The pointer of an empty one is null.
class Buffer {
 public:
  static constexpr uint16_t kPoison = 0x7fa5, kOnes = 0xffff;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int kGuard = 0;
#else
  static constexpr int kGuard = 8192;  // more than a tile of the widest rows
#endif

  Buffer() = default;
  Buffer(Element element, int64_t size, uint16_t fill = kPoison)
      : element_(element), fill_(fill), size_(size), halves_(size * width() + 2 * kGuard, kPoison) {
    std::fill(halves_.begin() + kGuard, halves_.end() - kGuard, fill);
  }

  int64_t size() const { return size_; }
  void* data() { return size_ == 0 ? nullptr : halves_.data() + kGuard; }
  void* data(int64_t element) { return size_ == 0 ? nullptr : halves_.data() + kGuard + element * width(); }
  double operator[](int64_t i) const {
    const uint16_t* const at = &halves_[kGuard + i * width()];
    if (element_ == Element::kTf32) return math::bits<float>(at[0] | static_cast<uint32_t>(at[1]) << 16);
    return element_ == Element::kBf16 ? from_bf16(*at) : from_fp16(*at);
  }
  void set(int64_t i, double v) {
    const float value = static_cast<float>(v);
    uint16_t* const at = &halves_[kGuard + i * width()];
    if (element_ == Element::kTf32) {
      std::memcpy(at, &value, sizeof value);
    } else {
      *at = element_ == Element::kBf16 ? bf16_bits(value) : fp16_bits(value);
    }
  }
  void set_ones(int64_t i) { std::memset(&halves_[kGuard + i * width()], 0xff, width() * 2); }
  bool is_untouched(int64_t i) const {
    const uint16_t* const at = &halves_[kGuard + i * width()];
    return at[0] == fill_ && at[width() - 1] == fill_;
  }
  bool guards_hold() const {
    const auto holds = [](uint16_t half) { return half == kPoison; };
    return std::all_of(halves_.begin(), halves_.begin() + kGuard, holds) &&
           std::all_of(halves_.end() - kGuard, halves_.end(), holds);
  }
  bool holds_sentinel() const {
    for (size_t i = kGuard; i + 1 < halves_.size() - kGuard; i += 2) {
      if (halves_[i] == kOnes && halves_[i + 1] == kOnes) return true;
    }
    return false;
  }
  bool operator!=(const Buffer& other) const { return halves_ != other.halves_; }

 private:
  int width() const { return element_ == Element::kTf32 ? 2 : 1; }

  Element element_{};
  uint16_t fill_ = kPoison;
  int64_t size_ = 0;
  std::vector<uint16_t> halves_;
};

// `count` elements from `begin` on; zeros if the buffer is empty.
inline Values values(const Buffer& buffer, int64_t begin, int64_t count) {
  Values v(count);
  for (int64_t i = 0; i < count && buffer.size() > 0; ++i) v[i] = buffer[begin + i];
  return v;
}

// ---- A layer, its inputs and its outputs ----------------------------------------------------------------------------

enum { kX, kW, kWt, kBih, kBhh, kH0, kC0, kResetH, kResetC, kDhN, kDcN, kDy, kDcs, kDrop, kZoneH, kZoneC, kInputs };
enum { kY, kCs, kHn, kCn, kHPrev, kSaved, kStatePrev, kDgates, kDh0, kDc0, kDresetH, kDresetC, kOutputs };
const char* const kOutputNames[] = {"y",          "c_sequence", "h_n", "c_n", "h_prev",   "saved",
                                    "state_prev", "dgates",     "dh0", "dc0", "dreset h", "dreset c"};

struct CellInfo {
  CellKind kind;
  const char* name;
  int64_t gates, saved, grads, hidden_grads;
  bool has_c, uses_h;
};

struct Layer {
  CellInfo cell;
  Element element;
  int64_t T, B, H, Hp, D;
  bool biases, states, with_dy, with_cs, nan, drops;
  int64_t zone_rows;     // rows of the zoneout factors; 0: no zoneout
  int64_t reset_states;  // how many reset states are given; 0: zeros, 1: the same at every step, T: one for each step
  std::vector<int32_t> lengths;
  std::vector<uint8_t> resets;  // [T, B], then ones, so that a kernel that reads a reset beyond the last step fails

  // flags: 'b': biases; 's': initial states, and their gradients; 'd': dy; 'c': c of every step, and its gradient; 'l':
  // lengths; 'n': NaN in one row; resets to zeros ('z'), to the same states at every step ('e') or to states per step
  // ('p'); 'm': recurrent dropout and zoneout with masks; 'v': zoneout with one vector for all rows.
  Layer(const CellInfo& cell_, Element element_, int64_t T_, int64_t B_, int64_t H_, int directions,
        const std::string& flags)
      : cell(cell_), element(element_), T(T_), B(B_), H(H_), Hp(padded(static_cast<int>(H), element)), D(directions) {
    const auto has = [&](char flag) { return flags.find(flag) != std::string::npos; };
    biases = has('b'), states = has('s'), with_dy = has('d'), with_cs = has('c') && cell.has_c, nan = has('n');
    drops = has('m'), zone_rows = has('m') ? T * B : has('v');
    reset_states = has('p') ? T : has('e');
    for (int64_t b = 0; has('l') && b < B; ++b) {
      const int64_t pattern[] = {T, 0, T - 1, T / 2};
      lengths.push_back(static_cast<int32_t>(pattern[b % 4]));
    }
    std::mt19937 random(2);
    for (int64_t i = 0; (has('z') || reset_states > 0) && i < T * B; ++i) resets.push_back(random() % 10 < 3);
    if (Buffer::kGuard > 0 && !resets.empty()) resets.insert(resets.end(), B, 1);
  }

  bool active(int64_t t, int64_t b) const { return lengths.empty() || t < lengths[b]; }
  // Whether a reset lies between steps t - 1 and t of row b.
  bool border(int64_t t, int64_t b) const {
    return !resets.empty() && t > 0 && t < T && active(t, b) && resets[t * B + b] != 0;
  }
  // Whether the states before step t of direction d are replaced.
  bool begins(int d, int64_t t, int64_t b) const { return border(d == 0 ? t : t + 1, b); }
  int64_t zone_stride() const { return zone_rows > 1 ? D * H : 0; }
  bool keeps_state() const { return cell.has_c || (cell.uses_h && drops); }
  int64_t time(int d, int64_t step, bool backwards) const { return backwards != (d == 1) ? T - 1 - step : step; }
  int64_t input_size(int i) const {
    const int64_t c = cell.has_c, weights = cell.gates * H * Hp, bias = biases * cell.gates * H, state = B * H,
                  sequence = T * B * D * H;
    switch (i) {
      case kX:
        return T * B * cell.gates * H;
      case kW:
      case kWt:
        return weights;
      case kBih:
      case kBhh:
        return bias;
      case kH0:
      case kDhN:
        return states * state;
      case kC0:
      case kDcN:
        return states * c * state;
      case kResetH:
        return reset_states * state;
      case kResetC:
        return reset_states * c * state;
      case kDy:
        return with_dy * sequence;
      case kDrop:
        return drops * state;
      case kZoneH:
        return zone_rows * D * H;
      case kZoneC:
        return zone_rows * c * D * H;
      default:
        return with_cs * sequence;
    }
  }
  int64_t output_size(int i) const {
    const int64_t c = cell.has_c, state = B * H, dreset = reset_states > 0 ? T * state : 0;
    const int64_t sizes[] = {T * state * D,
                             with_cs * T * state * D,
                             state,
                             c * state,
                             T * B * Hp,
                             T * state * cell.saved,
                             keeps_state() * T * state,
                             T * B * cell.grads * Hp,
                             states * state,
                             states * c * state,
                             dreset,
                             c * dreset};
    return sizes[i];
  }
};

// The y, c_sequence and their gradients of both directions are in one buffer, that of the first direction.
using Inputs = Buffer[2][kInputs];
using Expected = Values[2][kOutputs];
inline bool is_shared(int output) { return output == kY || output == kCs; }
struct Results {
  Buffer outputs[2][kOutputs];

  explicit Results(const Layer& l) {
    for (int i = 0; i < 2 * kOutputs; ++i) {
      const int d = i / kOutputs, k = i % kOutputs;
      const bool exchanged = k == kHPrev || k == kDgates;
      outputs[d][k] =
          Buffer(k == kStatePrev ? Element::kTf32 : l.element, d < (is_shared(k) ? 1 : l.D) ? l.output_size(k) : 0,
                 exchanged ? Buffer::kOnes : Buffer::kPoison);
    }
  }
};

inline void draw(const Layer& l, Inputs& in) {
  std::mt19937_64 random(1);
  for (int d = 0; d < l.D; ++d) {
    for (int i = 0; i < kInputs; ++i) {
      Buffer& v = in[d][i] = Buffer(l.element, l.input_size(i));
      const double scale = i == kW ? 1.5 / std::sqrt(static_cast<double>(l.H)) : 1;
      for (int64_t k = 0; k < v.size(); ++k) {
        const double value = (static_cast<double>(random() >> 11) / (1ull << 52) - 1) * scale;
        if (i == kZoneH || i == kZoneC) {
          v.set(k, std::abs(value));
          continue;
        }
        const bool padding = i == kWt || (i == kW && k % l.Hp >= l.H);
        v.set(k, padding ? 0 : as_exchanged(l.element, value));
      }
    }
    for (int64_t k = 0; k < l.cell.gates * l.H * l.H; ++k) {
      const int64_t gate = k / (l.H * l.H), to = k / l.H % l.H, from = k % l.H;
      in[d][kWt].set((from * l.cell.gates + gate) * l.Hp + to, in[d][kW][(gate * l.H + to) * l.Hp + from]);
    }
    if (!l.nan) continue;
    // NaNs with all bits set (kNotReady), in two neighbouring units and in a gate through which they reach h with sign
    // and payload unchanged. The kernels must not publish them as they are.
    const int64_t t = 1, b = l.B > 4 ? 4 : 0, gate = l.cell.gates == 1 ? 0 : 2;
    for (int64_t unit = 2; unit < 4; ++unit) in[d][kX].set_ones(((t * l.B + b) * l.cell.gates + gate) * l.H + unit);
  }
}

// The zoneout factor of the new state; 1 without zoneout.
inline double share(const Layer& l, const Inputs& in, int kind, int64_t row, int d, int64_t unit) {
  const Buffer& zone = in[0][kind];
  return zone.size() == 0 ? 1 : zone[row * l.zone_stride() + d * l.H + unit];
}
inline double drop(const Layer& l, const Inputs& in, int d, int64_t b, int64_t unit) {
  return l.drops ? in[d][kDrop][b * l.H + unit] : 1;
}

// ---- The reference --------------------------------------------------------------------------------------------------

template <class C>
void expect_forward(const Layer& l, const Inputs& in, int d, Expected& out) {
  constexpr int G = C::kGates;
  const int64_t B = l.B, H = l.H;
  const Values w = values(in[d][kW], 0, G * H * l.Hp), b_ih = values(in[d][kBih], 0, G * H),
               b_hh = values(in[d][kBhh], 0, G * H);
  for (int64_t b = 0; b < B; ++b) {
    Values h = values(in[d][kH0], b * H, H), c = values(in[d][kC0], b * H, H);
    for (int64_t step = 0; step < l.T; ++step) {
      const int64_t t = l.time(d, step, false), row = t * B + b;
      if (l.begins(d, t, b)) {
        const int64_t at = (l.reset_states > 1 ? row : b) * H;
        h = values(in[d][kResetH], at, H), c = values(in[d][kResetC], at, H);
      }
      double* const operand = &out[d][kHPrev][row * l.Hp];
      for (int64_t k = 0; k < H; ++k) operand[k] = as_exchanged(l.element, h[k] * drop(l, in, d, b, k));
      for (int64_t unit = 0; unit < H && l.active(t, b); ++unit) {
        double x[G], r[G], saved[C::kSaved];
        for (int gate = 0; gate < G; ++gate) {
          const int64_t gate_row = gate * H + unit;
          x[gate] = in[d][kX][row * G * H + gate_row] + b_ih[gate_row];
          r[gate] = b_hh[gate_row];
          for (int64_t k = 0; k < H; ++k) r[gate] += w[gate_row * l.Hp + k] * operand[k];
        }
        const double h_prev = h[unit], c_prev = c[unit];
        if (l.keeps_state()) out[d][kStatePrev][row * H + unit] = C::kHasC ? c_prev : h_prev;
        C::forward(x, r, h_prev, c[unit], saved, h[unit]);
        h[unit] = h_prev + share(l, in, kZoneH, row, d, unit) * (h[unit] - h_prev);
        c[unit] = c_prev + share(l, in, kZoneC, row, d, unit) * (c[unit] - c_prev);
        out[0][kY][(row * l.D + d) * H + unit] = h[unit];
        if (l.with_cs) out[0][kCs][(row * l.D + d) * H + unit] = c[unit];
        for (int k = 0; k < C::kSaved; ++k) {
          out[d][kSaved][(row * C::kSaved + k) * H + unit] = as_stored(l.element, saved[k]);
        }
      }
    }
    std::copy(h.begin(), h.end(), &out[d][kHn][b * H]);
    if (C::kHasC) std::copy(c.begin(), c.end(), &out[d][kCn][b * H]);
  }
}

template <class C>
void expect_backward(const Layer& l, const Inputs& in, int d, Expected& out) {
  const int64_t B = l.B, H = l.H, Hp = l.Hp;
  const Values w_t = values(in[d][kWt], 0, H * C::kGates * Hp);
  for (int64_t b = 0; b < B; ++b) {
    Values dh = values(in[d][kDhN], b * H, H), dc = values(in[d][kDcN], b * H, H);
    for (int64_t step = 0; step < l.T; ++step) {
      const int64_t t = l.time(d, step, true), row = t * B + b;
      double* const dgates = &out[d][kDgates][row * C::kGrads * Hp];
      for (int64_t unit = 0; unit < H && l.active(t, b); ++unit) {
        double saved[C::kSaved], grads[C::kGrads], dh_prev = 0;
        for (int k = 0; k < C::kSaved; ++k) saved[k] = out[d][kSaved][(row * C::kSaved + k) * H + unit];
        const double c_prev = C::kHasC ? out[d][kStatePrev][row * H + unit] : 0;
        if (l.with_dy) dh[unit] += in[0][kDy][(row * l.D + d) * H + unit];
        if (l.with_cs) dc[unit] += in[0][kDcs][(row * l.D + d) * H + unit];
        const double share_h = share(l, in, kZoneH, row, d, unit), share_c = share(l, in, kZoneC, row, d, unit);
        const double h_prev =
            l.drops && C::kUsesH ? out[d][kStatePrev][row * H + unit] : out[d][kHPrev][row * Hp + unit];
        double dc_cell = share_c * dc[unit];
        C::backward(saved, h_prev, c_prev, share_h * dh[unit], dc_cell, grads, dh_prev);
        dh[unit] = dh_prev + (1 - share_h) * dh[unit];
        dc[unit] = dc_cell + (1 - share_c) * dc[unit];
        for (int k = 0; k < C::kGrads; ++k) dgates[k * Hp + unit] = as_exchanged(l.element, grads[k]);
      }
      for (int64_t unit = 0; unit < H; ++unit) {
        const double *const w = &w_t[unit * C::kGates * Hp], *const v = dgates + C::kHiddenGrads * Hp;
        double sum = 0;
        for (int64_t k = 0; k < C::kGates * Hp; ++k) sum += w[k] * v[k];
        dh[unit] += sum * drop(l, in, d, b, unit);
      }
      if (!l.begins(d, t, b)) continue;
      for (int64_t unit = 0; unit < H; ++unit) {
        if (l.reset_states > 0) out[d][kDresetH][row * H + unit] = dh[unit];
        if (l.reset_states > 0 && C::kHasC) out[d][kDresetC][row * H + unit] = dc[unit];
        dh[unit] = dc[unit] = 0;
      }
    }
    if (!l.states) continue;
    std::copy(dh.begin(), dh.end(), &out[d][kDh0][b * H]);
    if (C::kHasC) std::copy(dc.begin(), dc.end(), &out[d][kDc0][b * H]);
  }
}

inline void expect(const Layer& l, const Inputs& in, Expected& out) {
  for (int d = 0; d < l.D; ++d) {
    for (int k = 0; k < kOutputs; ++k) {  // the values of padding and of rows that have ended
      const bool untouched = k == kSaved || k == kStatePrev || k == kDresetH || k == kDresetC;
      out[d][k].assign(l.output_size(k), untouched ? kUntouched : 0);
    }
  }
  for (int d = 0; d < l.D; ++d) {
#define CHECK_EXPECT(kind_, policy, name)   \
  if (l.cell.kind == CellKind::kind_) {     \
    expect_forward<policy>(l, in, d, out);  \
    expect_backward<policy>(l, in, d, out); \
  }
    FUSED_RNN_CELLS(CHECK_EXPECT)
  }
}

}  // namespace check
}  // namespace cuda
}  // namespace fused_rnn
