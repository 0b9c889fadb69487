// One time step without its matrix products, for layers whose recurrent weights do not fit on the chip.
//
// Parallel over units and batch rows, one thread for each. The kernels are memory-bound, and the library's products
// take longer than they do. normalised.cuh uses the functions that begin and end the step of a unit.
#pragma once

#include "../cells/cells.h"
#include "element.h"
#include "params.h"
#include "regularised.cuh"

namespace fused_rnn {
namespace cuda {

constexpr int kPointwiseThreads = 256;

// Whether the states of row b are replaced at this border.
FUSED_RNN_DEVICE bool begins(const StepResets& resets, const int32_t* lengths, int64_t b) {
  return resets.at && resets.at[b] && (!lengths || resets.t < lengths[b]);
}

template <class Params>
FUSED_RNN_DEVICE bool is_active(const Params& p, int64_t b) {
  return !p.lengths || p.t < p.lengths[b];
}

template <class T>
struct States {
  T h, c;
};

// ---- Forward --------------------------------------------------------------------------------------------------------

template <class Cell, class E, class T = typename E::Arithmetic>
FUSED_RNN_DEVICE States<T> states_before(const StepForwardParams& p, int64_t at) {
  States<T> s{p.kept_h ? static_cast<const T*>(p.kept_h)[at] : value_or_zero<E>(p.h_prev, at), T(0)};
  if constexpr (Cell::kHasC) s.c = static_cast<const T*>(p.c)[at];
  return s;
}

// Stores the values that backward reads.
template <class Cell, class E, class T = typename E::Arithmetic>
FUSED_RNN_DEVICE void save_for_backward(const StepForwardParams& p, int64_t b, int64_t unit, const States<T>& before,
                                        const T (&saved)[Cell::kSaved]) {
  if (!p.saved) return;
  const int64_t H = p.H, at = b * H + unit;
  FUSED_RNN_UNROLL
  for (int k = 0; k < Cell::kSaved; ++k) store_value<E>(p.saved, (b * Cell::kSaved + k) * H + unit, saved[k]);
  if (p.state_prev) static_cast<T*>(p.state_prev)[at] = Cell::kHasC ? before.c : before.h;
}

// Ends a unit's step: zoneout, then stores the states in the results and, replaced at a reset, for the next step. Rows
// that are not active keep their states.
template <class Cell, class E, class T = typename E::Arithmetic>
FUSED_RNN_DEVICE void store_states(const StepForwardParams& p, int64_t b, int64_t unit, bool active,
                                   const States<T>& before, States<T> s) {
  const int64_t at = b * p.H + unit, y_index = b * p.y_stride + unit;
  s.h = active ? mixed(p.zones.h, share<E>(p.zones.h, b, unit), before.h, s.h) : before.h;
  store_value<E>(p.y, y_index, active ? s.h : T(0));
  if constexpr (Cell::kHasC) {
    s.c = active ? mixed(p.zones.c, share<E>(p.zones.c, b, unit), before.c, s.c) : before.c;
    if (p.c_sequence) store_value<E>(p.c_sequence, y_index, active ? s.c : T(0));
  }
  if (begins(p.resets, p.lengths, b)) s = {value_or_zero<E>(p.reset.h, at), value_or_zero<E>(p.reset.c, at)};
  store_value<E>(p.h, at, dropped<E>(p.drop_h, at, s.h));
  if (p.kept_h) static_cast<T*>(p.kept_h)[at] = s.h;
  if constexpr (Cell::kHasC) static_cast<T*>(p.c)[at] = s.c;
}

template <class Cell, class E>
FUSED_RNN_KERNEL(kPointwiseThreads)
step_forward(const StepForwardParams p) {
  using T = typename E::Arithmetic;
  constexpr int G = Cell::kGates;
  const int64_t H = p.H, total = p.B * H;
  for (int64_t at = static_cast<int64_t>(block_index()) * kPointwiseThreads + thread_index(); at < total;
       at += static_cast<int64_t>(block_count()) * kPointwiseThreads) {
    const int64_t b = at / H, unit = at % H;
    const States<T> before = states_before<Cell, E>(p, at);
    const bool active = is_active(p, b);
    States<T> s = before;
    if (active) {
      T x[G], r[G], saved[Cell::kSaved];
      FUSED_RNN_UNROLL
      for (int gate = 0; gate < G; ++gate) {
        const int64_t gate_row = gate * H + unit;
        x[gate] = value_or_zero<E>(p.x_gates, b * G * H + gate_row) + value_or_zero<E>(p.b_ih, gate_row);
        r[gate] = value_or_zero<E>(p.h_gates, b * G * H + gate_row) + value_or_zero<E>(p.b_hh, gate_row);
      }
      Cell::forward(x, r, before.h, s.c, saved, s.h);
      save_for_backward<Cell, E>(p, b, unit, before, saved);
    }
    store_states<Cell, E>(p, b, unit, active, before, s);
  }
}

// ---- Backward -------------------------------------------------------------------------------------------------------

// The gradients of the states after this step, from the next step (in forward's order). At a reset between the two
// steps, the reset states receive them and the result is zero.
template <class Cell, class E, class T = typename E::Arithmetic>
FUSED_RNN_DEVICE States<T> gradients_from_next_step(const StepBackwardParams& p, int64_t b, int64_t at) {
  States<T> d{static_cast<const T*>(p.dh)[at] + dropped<E>(p.drop_h, at, value_or_zero<E>(p.product, at)), T(0)};
  if constexpr (Cell::kHasC) d.c = static_cast<const T*>(p.dc)[at];
  if (!begins(p.resets, p.lengths, b)) return d;
  if (p.dreset.h) store_value<E>(p.dreset.h, at, d.h);
  if (p.dreset.c) store_value<E>(p.dreset.c, at, d.c);
  return {T(0), T(0)};
}

// Adds the gradients of y and c_sequence.
template <class Cell, class E, class T = typename E::Arithmetic>
FUSED_RNN_DEVICE void add_output_gradients(const StepBackwardParams& p, int64_t b, int64_t unit, States<T>& d) {
  d.h += value_or_zero<E>(p.dy, b * p.dy_stride + unit);
  if constexpr (Cell::kHasC) d.c += value_or_zero<E>(p.dc_sequence, b * p.dy_stride + unit);
}

// The values of one unit that forward saved.
template <class Cell, class T>
struct Saved {
  T values[Cell::kSaved];
  States<T> before;
};
template <class Cell, class E, class T = typename E::Arithmetic>
FUSED_RNN_DEVICE Saved<Cell, T> load_saved(const StepBackwardParams& p, int64_t b, int64_t unit) {
  const int64_t H = p.H, at = b * H + unit;
  Saved<Cell, T> s{};
  FUSED_RNN_UNROLL
  for (int k = 0; k < Cell::kSaved; ++k) s.values[k] = value_or_zero<E>(p.saved, (b * Cell::kSaved + k) * H + unit);
  const T* const state = static_cast<const T*>(p.state_prev);
  if constexpr (Cell::kUsesH) s.before.h = state ? state[at] : value_or_zero<E>(p.h_prev, at);
  if constexpr (Cell::kHasC) s.before.c = state[at];
  return s;
}

template <class Cell, class E, class T = typename E::Arithmetic>
FUSED_RNN_DEVICE void store_gradients(const StepBackwardParams& p, int64_t b, int64_t unit, const States<T>& d,
                                      const T (&grads)[Cell::kGrads]) {
  const int64_t H = p.H, at = b * H + unit;
  static_cast<T*>(p.dh)[at] = d.h;
  if constexpr (Cell::kHasC) static_cast<T*>(p.dc)[at] = d.c;
  FUSED_RNN_UNROLL
  for (int k = 0; k < Cell::kGrads; ++k) store_value<E>(p.dgates, (b * Cell::kGrads + k) * H + unit, grads[k]);
}

template <class Cell, class E>
FUSED_RNN_KERNEL(kPointwiseThreads)
step_backward(const StepBackwardParams p) {
  using T = typename E::Arithmetic;
  const int64_t H = p.H, total = p.B * H;
  for (int64_t at = static_cast<int64_t>(block_index()) * kPointwiseThreads + thread_index(); at < total;
       at += static_cast<int64_t>(block_count()) * kPointwiseThreads) {
    const int64_t b = at / H, unit = at % H;
    States<T> d = gradients_from_next_step<Cell, E>(p, b, at);
    if (p.dh0) {
      store_value<E>(p.dh0, at, d.h);
      continue;
    }
    T grads[Cell::kGrads] = {};
    if (is_active(p, b)) {
      add_output_gradients<Cell, E>(p, b, unit, d);
      const Saved<Cell, T> s = load_saved<Cell, E>(p, b, unit);
      const SplitGradient<T> dh_split = split_gradient(p.zones.h, share<E>(p.zones.h, b, unit), d.h);
      const SplitGradient<T> dc_split = split_gradient(p.zones.c, share<E>(p.zones.c, b, unit), d.c);
      d = {T(0), dc_split.to_new};
      Cell::backward(s.values, s.before.h, s.before.c, dh_split.to_new, d.c, grads, d.h);
      d.h += dh_split.to_old, d.c += dc_split.to_old;
    }
    store_gradients<Cell, E>(p, b, unit, d, grads);
  }
}

}  // namespace cuda
}  // namespace fused_rnn
