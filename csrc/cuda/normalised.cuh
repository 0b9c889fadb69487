// One time step without its matrix products, with layer normalisation; fused_rnn/reference.py has the equations.
//
// Parallel over batch rows, one block for each, and within a block over units. The mean and variance of a row need all
// of its units. In the resident kernels several blocks share a row, and exchanging sums would double the latency of a
// step; layers with these norms therefore use a library's product at every step. Since one block has the whole row, no
// sum depends on the order of blocks, and every run gives the same bits.
#pragma once

#include <cmath>

#include "pointwise.cuh"

namespace fused_rnn {
namespace cuda {

constexpr int kPartialSums = 16;  // the number of partial sums in the last stage of block_sum()

template <class T>
constexpr int kNormalisedBytes = (kPointwiseThreads + kPartialSums) * static_cast<int>(sizeof(T));

// Returns the sum of `value` over the block's threads to all of them. Summation order is fixed.
template <class T>
FUSED_RNN_DEVICE T block_sum(Shared<T> shared, T value) {
  const int i = thread_index();
  shared[i] = value;
  sync_block();
  if (i < kPartialSums) {
    T partial = T(0);
    FUSED_RNN_UNROLL
    for (int k = 0; k < kPointwiseThreads; k += kPartialSums) partial += shared[i + k];
    shared[kPointwiseThreads + i] = partial;
  }
  sync_block();
  T sum = T(0);
  FUSED_RNN_UNROLL
  for (int k = 0; k < kPartialSums; ++k) sum += shared[kPointwiseThreads + k];
  return sum;
}

template <class T>
struct Moments {
  T mean, rstd;  // rstd: 1 / sqrt(variance + eps)
  FUSED_RNN_DEVICE T normalised(T value) const { return (value - mean) * rstd; }
};

// The moments of value(0), ..., value(count - 1), computed by the whole block.
template <class T, class F>
FUSED_RNN_DEVICE Moments<T> moments(Shared<T> shared, int64_t count, T eps, const F& value) {
  T sum = T(0), squares = T(0);
  for (int64_t i = thread_index(); i < count; i += kPointwiseThreads) sum += value(i);
  const T mean = block_sum(shared, sum) / static_cast<T>(count);
  for (int64_t i = thread_index(); i < count; i += kPointwiseThreads) squares += (value(i) - mean) * (value(i) - mean);
  return {mean, T(1) / std::sqrt(block_sum(shared, squares) / static_cast<T>(count) + eps)};
}

// Backward of the normalisation of a row. The threads first add() the gradient `d` of every normalised value (before
// its gain), then finish(), and then backward() gives the gradient of a value before normalisation.
template <class T>
class NormalisationBackward {
 public:
  FUSED_RNN_DEVICE NormalisationBackward(const Moments<T>& moments, int64_t count)
      : moments_(moments), count_(static_cast<T>(count)) {}
  FUSED_RNN_DEVICE void add(T normalised, T d) { mean_d_ += d, mean_product_ += d * normalised; }
  FUSED_RNN_DEVICE void finish(Shared<T> shared) {
    mean_d_ = block_sum(shared, mean_d_) / count_, mean_product_ = block_sum(shared, mean_product_) / count_;
  }
  FUSED_RNN_DEVICE T backward(T normalised, T d) const {
    return (d - mean_d_ - normalised * mean_product_) * moments_.rstd;
  }

 private:
  Moments<T> moments_;
  T count_, mean_d_ = T(0), mean_product_ = T(0);
};

template <class Cell, class E>
FUSED_RNN_KERNEL(kPointwiseThreads)
normalised_forward(const NormalisedForwardParams params) {
  using T = typename E::Arithmetic;
  constexpr int G = Cell::kGates;
  const StepForwardParams& p = params.step;
  const StepNorms& norms = params.norms;
  const Shared<T> shared = shared_memory<T>(0);
  const int64_t H = p.H;
  const T eps = static_cast<T>(norms.eps);
  for (int64_t b = block_index(); b < p.B; b += block_count()) {
    const bool active = is_active(p, b), normalises_c = Cell::kHasC && active && norms.gain_c;
    T* const statistics = static_cast<T*>(norms.statistics) + b * 4;
    T* const scratch = static_cast<T*>(params.scratch) + b * 2 * H;
    Moments<T> moments_h{T(0), T(1)};
    if (active && norms.gain_h) {
      moments_h = moments(shared, G * H, eps, [&](int64_t i) { return value_or_zero<E>(p.h_gates, b * G * H + i); });
      if (thread_index() == 0) statistics[0] = moments_h.mean, statistics[1] = moments_h.rstd;
    }
    for (int64_t unit = thread_index(); unit < H; unit += kPointwiseThreads) {
      const States<T> before = states_before<Cell, E>(p, b * H + unit);
      States<T> s = before;
      if (active) {
        T x[G], r[G], saved[Cell::kSaved];
        FUSED_RNN_UNROLL
        for (int gate = 0; gate < G; ++gate) {
          const int64_t gate_row = gate * H + unit;
          x[gate] = value_or_zero<E>(p.x_gates, b * G * H + gate_row) + value_or_zero<E>(p.b_ih, gate_row);
          r[gate] = value_or_zero<E>(p.h_gates, b * G * H + gate_row);
          if (norms.gain_h) r[gate] = moments_h.normalised(r[gate]) * value_or_zero<E>(norms.gain_h, gate_row);
          r[gate] += value_or_zero<E>(p.b_hh, gate_row);
        }
        Cell::forward(x, r, before.h, s.c, saved, s.h);
        save_for_backward<Cell, E>(p, b, unit, before, saved);
        if constexpr (Cell::kHasC) {
          if (normalises_c) {  // h needs c of the whole row, so the row's second half follows below
            scratch[unit] = s.c, scratch[H + unit] = saved[3];
            continue;
          }
        }
      }
      store_states<Cell, E>(p, b, unit, active, before, s);
    }
    if constexpr (Cell::kHasC) {
      if (!normalises_c) continue;
      const Moments<T> moments_c = moments(shared, H, eps, [&](int64_t i) { return scratch[i]; });
      if (thread_index() == 0) statistics[2] = moments_c.mean, statistics[3] = moments_c.rstd;
      for (int64_t unit = thread_index(); unit < H; unit += kPointwiseThreads) {
        const T c = scratch[unit], gained = moments_c.normalised(c) * value_or_zero<E>(norms.gain_c, unit);
        const T h = Cell::output(scratch[H + unit], gained + value_or_zero<E>(norms.bias_c, unit));
        store_states<Cell, E>(p, b, unit, true, states_before<Cell, E>(p, b * H + unit), {h, c});
      }
    }
  }
}

// Backward of h = o * tanh(gained), where gained = gain_c * LN(c) + bias_c: the gradients of o before its sigmoid and
// of gained, and LN(c).
template <class T>
struct OutputGradients {
  T normalised_c, d_gate, d_gained;
};
template <class Cell, class E, class T = typename E::Arithmetic>
FUSED_RNN_DEVICE OutputGradients<T> output_backward(const StepNorms& norms, const Moments<T>& moments_c, int64_t unit,
                                                    const Saved<Cell, T>& s, T dh) {
  OutputGradients<T> out{moments_c.normalised(Cell::next_c(s.values, s.before.c)), T(0), T(0)};
  const T gained = out.normalised_c * value_or_zero<E>(norms.gain_c, unit) + value_or_zero<E>(norms.bias_c, unit);
  out.d_gained = Cell::output_backward(s.values[3], gained, dh, out.d_gate);
  return out;
}

template <class Cell, class E>
FUSED_RNN_KERNEL(kPointwiseThreads)
normalised_backward(const NormalisedBackwardParams params) {
  using T = typename E::Arithmetic;
  constexpr int G = Cell::kGates;
  const StepBackwardParams& p = params.step;
  const StepNorms& norms = params.norms;
  const Shared<T> shared = shared_memory<T>(0);
  const int64_t H = p.H;
  T *const dh = static_cast<T*>(p.dh), *const dc = static_cast<T*>(p.dc);
  for (int64_t b = block_index(); b < p.B; b += block_count()) {
    const bool active = is_active(p, b), normalises_h = active && norms.gain_h;
    const bool normalises_c = Cell::kHasC && active && norms.gain_c;
    const T* const statistics = static_cast<const T*>(norms.statistics) + b * 4;
    const Moments<T> moments_h{statistics[0], statistics[1]}, moments_c{statistics[2], statistics[3]};
    NormalisationBackward<T> backward_h(moments_h, G * H), backward_c(moments_c, H);

    // The gradients of h and c, and the sums over the row that the normalisation of c needs.
    for (int64_t unit = thread_index(); unit < H; unit += kPointwiseThreads) {
      const int64_t at = b * H + unit;
      States<T> d = gradients_from_next_step<Cell, E>(p, b, at);
      if (active) add_output_gradients<Cell, E>(p, b, unit, d);
      dh[at] = d.h;
      if constexpr (Cell::kHasC) {
        dc[at] = d.c;
        if (!normalises_c) continue;
        const T dh_new = split_gradient(p.zones.h, share<E>(p.zones.h, b, unit), d.h).to_new;
        const OutputGradients<T> out =
            output_backward<Cell, E>(norms, moments_c, unit, load_saved<Cell, E>(p, b, unit), dh_new);
        backward_c.add(out.normalised_c, out.d_gained * value_or_zero<E>(norms.gain_c, unit));
      }
    }
    if (normalises_c) backward_c.finish(shared);

    // The gate gradients, and the sums over the row that the normalisation of W_hh h needs.
    for (int64_t unit = thread_index(); unit < H; unit += kPointwiseThreads) {
      const int64_t at = b * H + unit;
      States<T> d{dh[at], T(0)};
      if constexpr (Cell::kHasC) d.c = dc[at];
      T grads[Cell::kGrads] = {};
      if (active) {
        const Saved<Cell, T> s = load_saved<Cell, E>(p, b, unit);
        const SplitGradient<T> dh_split = split_gradient(p.zones.h, share<E>(p.zones.h, b, unit), d.h);
        const SplitGradient<T> dc_split = split_gradient(p.zones.c, share<E>(p.zones.c, b, unit), d.c);
        d = {T(0), dc_split.to_new};
        if (!normalises_c) Cell::backward(s.values, s.before.h, s.before.c, dh_split.to_new, d.c, grads, d.h);
        if constexpr (Cell::kHasC) {
          if (normalises_c) {
            const OutputGradients<T> out = output_backward<Cell, E>(norms, moments_c, unit, s, dh_split.to_new);
            T* const dnorm = static_cast<T*>(params.dnorm_c) + b * 2 * H + unit;
            dnorm[0] += out.d_gained * out.normalised_c, dnorm[H] += out.d_gained;
            d.c += backward_c.backward(out.normalised_c, out.d_gained * value_or_zero<E>(norms.gain_c, unit));
            Cell::gates_backward(s.values, s.before.c, d.c, grads);
            grads[3] = out.d_gate;
          }
        }
        d.h += dh_split.to_old, d.c += dc_split.to_old;
      }
      store_gradients<Cell, E>(p, b, unit, d, grads);
      if (!normalises_h) continue;
      FUSED_RNN_UNROLL
      for (int gate = 0; gate < G; ++gate) {
        const int64_t gate_row = gate * H + unit, index = b * G * H + gate_row;
        const T normalised = moments_h.normalised(value_or_zero<E>(params.h_gates, index));
        const T grad = grads[Cell::kHiddenGrads + gate];
        static_cast<T*>(params.dgain_h)[index] += grad * normalised;
        backward_h.add(normalised, grad * value_or_zero<E>(norms.gain_h, gate_row));
      }
    }
    if (!norms.gain_h) continue;
    if (normalises_h) backward_h.finish(shared);

    // The gradient of W_hh h before normalisation.
    for (int64_t i = thread_index(); i < G * H; i += kPointwiseThreads) {
      const int64_t index = b * G * H + i, hidden = b * Cell::kGrads * H + Cell::kHiddenGrads * H + i;
      T d = T(0);
      if (normalises_h) {
        const T grad = value_or_zero<E>(p.dgates, hidden) * value_or_zero<E>(norms.gain_h, i);
        d = backward_h.backward(moments_h.normalised(value_or_zero<E>(params.h_gates, index)), grad);
      }
      store_value<E>(params.dh_gates, index, d);
    }
  }
}

}  // namespace cuda
}  // namespace fused_rnn
