// One time step without its products: what is left of a recurrence whose weights do not stay on the chip.
//
// Parallel over units and batch rows, one thread for each. Bound by the memory it reads; the products by a library
// before and after take longer.
#pragma once

#include "../cells/cells.h"
#include "element.h"
#include "params.h"

namespace fused_rnn {
namespace cuda {

constexpr int kPointwiseThreads = 256;

FUSED_RNN_DEVICE bool begins(const StepResets& resets, const int32_t* lengths, int64_t b) {
  return resets.at && resets.at[b] && (!lengths || resets.t < lengths[b]);
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
    const T h_prev = value_or_zero<E>(p.h_prev, at);
    const bool active = !p.lengths || p.t < p.lengths[b];
    T h = h_prev, c{};
    if constexpr (Cell::kHasC) c = static_cast<const T*>(p.c)[at];
    if (active) {
      T x[G], r[G], saved[Cell::kSaved];
      FUSED_RNN_UNROLL
      for (int gate = 0; gate < G; ++gate) {
        const int64_t of_gate = gate * H + unit;
        x[gate] = value_or_zero<E>(p.x_gates, b * G * H + of_gate) + value_or_zero<E>(p.b_ih, of_gate);
        r[gate] = value_or_zero<E>(p.h_gates, b * G * H + of_gate) + value_or_zero<E>(p.b_hh, of_gate);
      }
      const T c_prev = c;
      Cell::forward(x, r, h_prev, c, saved, h);
      if (p.saved) {
        FUSED_RNN_UNROLL
        for (int k = 0; k < Cell::kSaved; ++k) store_value<E>(p.saved, (b * Cell::kSaved + k) * H + unit, saved[k]);
        if constexpr (Cell::kHasC) static_cast<T*>(p.c_prev)[at] = c_prev;
      }
    }
    store_value<E>(p.y, b * p.y_stride + unit, active ? h : T(0));
    if (Cell::kHasC && p.c_sequence) store_value<E>(p.c_sequence, b * p.y_stride + unit, active ? c : T(0));
    if (begins(p.resets, p.lengths, b)) {
      h = value_or_zero<E>(p.reset.h, at);
      c = value_or_zero<E>(p.reset.c, at);
    }
    store_value<E>(p.h, at, h);
    if constexpr (Cell::kHasC) static_cast<T*>(p.c)[at] = c;
  }
}

template <class Cell, class E>
FUSED_RNN_KERNEL(kPointwiseThreads)
step_backward(const StepBackwardParams p) {
  using T = typename E::Arithmetic;
  const int64_t H = p.H, total = p.B * H;
  for (int64_t at = static_cast<int64_t>(block_index()) * kPointwiseThreads + thread_index(); at < total;
       at += static_cast<int64_t>(block_count()) * kPointwiseThreads) {
    const int64_t b = at / H, unit = at % H;
    T dh = static_cast<const T*>(p.dh)[at] + value_or_zero<E>(p.product, at), dc{};
    if constexpr (Cell::kHasC) dc = static_cast<const T*>(p.dc)[at];
    if (begins(p.resets, p.lengths, b)) {  // this belongs to the state that came in there, and goes no further
      if (p.dreset.h) store_value<E>(p.dreset.h, at, dh);
      if (p.dreset.c) store_value<E>(p.dreset.c, at, dc);
      dh = dc = T(0);
    }
    if (p.dh0) {
      store_value<E>(p.dh0, at, dh);
      continue;
    }
    T grads[Cell::kGrads] = {};
    if (!p.lengths || p.t < p.lengths[b]) {
      T saved[Cell::kSaved], h_prev{}, c_prev{}, dh_prev{};
      FUSED_RNN_UNROLL
      for (int k = 0; k < Cell::kSaved; ++k) saved[k] = value_or_zero<E>(p.saved, (b * Cell::kSaved + k) * H + unit);
      if constexpr (Cell::kUsesH) h_prev = value_or_zero<E>(p.h_prev, at);
      if constexpr (Cell::kHasC) {
        c_prev = static_cast<const T*>(p.c_prev)[at];
        dc += value_or_zero<E>(p.dc_sequence, b * p.dy_stride + unit);
      }
      dh += value_or_zero<E>(p.dy, b * p.dy_stride + unit);
      Cell::backward(saved, h_prev, c_prev, dh, dc, grads, dh_prev);
      dh = dh_prev;
    }
    static_cast<T*>(p.dh)[at] = dh;
    if constexpr (Cell::kHasC) static_cast<T*>(p.dc)[at] = dc;
    FUSED_RNN_UNROLL
    for (int k = 0; k < Cell::kGrads; ++k) store_value<E>(p.dgates, (b * Cell::kGrads + k) * H + unit, grads[k]);
  }
}

}  // namespace cuda
}  // namespace fused_rnn
