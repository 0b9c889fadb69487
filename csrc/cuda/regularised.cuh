// Zoneout and recurrent dropout of one unit and row; the equations are in fused_rnn/reference.py. Without them each is
// a branch that all threads take alike.
#pragma once

#include "element.h"
#include "layout.h"
#include "params.h"

namespace fused_rnn {
namespace cuda {

// h as W_hh multiplies it, or of a gradient, what of it comes back; `at`: of drop_h.
template <class E, class T>
FUSED_RNN_DEVICE T dropped(const void* drop_h, int64_t at, T h) {
  return drop_h ? h * value_or_zero<E>(drop_h, at) : h;
}

// The share of the new state that a row takes.
template <class E>
FUSED_RNN_DEVICE typename E::Arithmetic share(const Zone& zone, int64_t row, int64_t unit) {
  return value_or_zero<E>(zone.at, row * zone.stride + unit);
}

// That of a thread's rows. Where a thread has but one row it is read early, so that a product hides the way from
// memory; with several there is no register left for it.
template <class E, class Shape>
class Shares {
 public:
  FUSED_RNN_DEVICE explicit Shares(const Zone& zone) : zone_(zone) {}
  FUSED_RNN_DEVICE void read(int64_t row, int64_t unit) {
    if (kEarly) early_ = share<E>(zone_, row, unit);
  }
  FUSED_RNN_DEVICE float get(int64_t row, int64_t unit) const { return kEarly ? early_ : share<E>(zone_, row, unit); }

 private:
  static constexpr bool kEarly = Shape::kRowsOfThread == 1;
  const Zone& zone_;
  float early_ = 0.0f;
};

template <class T>
FUSED_RNN_DEVICE T mixed(const Zone& zone, T share, T old_state, T new_state) {
  return zone.at ? old_state + share * (new_state - old_state) : new_state;
}

// A state's gradient: of the new one, and directly of the old one.
template <class T>
struct Parted {
  T of_new, of_old;
};
template <class T>
FUSED_RNN_DEVICE Parted<T> parted(const Zone& zone, T share, T d) {
  if (!zone.at) return {d, T(0)};
  return {d * share, d - d * share};
}

}  // namespace cuda
}  // namespace fused_rnn
