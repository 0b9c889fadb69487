// Zoneout and recurrent dropout of one unit and row; fused_rnn/reference.py has the equations. Whether a layer has them
// is the same for all threads, so the branches do not diverge.
#pragma once

#include "element.h"
#include "params.h"

namespace fused_rnn {
namespace cuda {

// h (or dh) times drop_h[at].
template <class E, class T>
FUSED_RNN_DEVICE T dropped(const void* drop_h, int64_t at, T h) {
  return drop_h ? h * value_or_zero<E>(drop_h, at) : h;
}

// The zoneout factor of the new state.
template <class E>
FUSED_RNN_DEVICE typename E::Arithmetic share(const Zone& zone, int64_t row, int64_t unit) {
  return value_or_zero<E>(zone.at, row * zone.stride + unit);
}

template <class T>
FUSED_RNN_DEVICE T mixed(const Zone& zone, T share, T old_state, T new_state) {
  return zone.at ? old_state + share * (new_state - old_state) : new_state;
}

// Backward of mixed(): the gradients of the new and of the old state.
template <class T>
struct SplitGradient {
  T to_new, to_old;
};
template <class T>
FUSED_RNN_DEVICE SplitGradient<T> split_gradient(const Zone& zone, T share, T d) {
  if (!zone.at) return {d, T(0)};
  return {d * share, d - d * share};
}

}  // namespace cuda
}  // namespace fused_rnn
