// One time step without its products, with layer normalisation; the equations are in fused_rnn/reference.py.
//
// A row's mean and deviation need all of its sums. No block of the resident kernels has those, and a further exchange
// between blocks would double what a step of theirs takes, so layers with these norms take the way of a product for
// every step. Here one block has a whole row, so nothing is added up across blocks and every run gives the same bits.
#pragma once

#include <cmath>

#include "pointwise.cuh"

namespace fused_rnn {
namespace cuda {

constexpr int kPartialSums = 16;  // that each thread adds up at last

template <class T>
constexpr int kNormalisedBytes = (kPointwiseThreads + kPartialSums) * static_cast<int>(sizeof(T));

// The sum over the block's threads, for all of them.
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
  T mean, inverse;  // of the deviation
  FUSED_RNN_DEVICE T normalised(T value) const { return (value - mean) * inverse; }
};

template <class T, class F>
FUSED_RNN_DEVICE Moments<T> moments(Shared<T> shared, int64_t count, T eps, const F& value) {
  T sum = T(0), squares = T(0);
  for (int64_t i = thread_index(); i < count; i += kPointwiseThreads) sum += value(i);
  const T mean = block_sum(shared, sum) / static_cast<T>(count);
  for (int64_t i = thread_index(); i < count; i += kPointwiseThreads) squares += (value(i) - mean) * (value(i) - mean);
  return {mean, T(1) / std::sqrt(block_sum(shared, squares) / static_cast<T>(count) + eps)};
}

// What of a normalised row's gradient reaches what was normalised; `d` is that of the normalised values, before gain.
template <class T>
class NormalisedRow {
 public:
  FUSED_RNN_DEVICE NormalisedRow(const Moments<T>& moments, int64_t count)
      : moments_(moments), count_(static_cast<T>(count)) {}
  FUSED_RNN_DEVICE void add(T normalised, T d) { mean_ += d, along_ += d * normalised; }
  FUSED_RNN_DEVICE void finish(Shared<T> shared) {
    mean_ = block_sum(shared, mean_) / count_, along_ = block_sum(shared, along_) / count_;
  }
  FUSED_RNN_DEVICE T backward(T normalised, T d) const { return (d - mean_ - normalised * along_) * moments_.inverse; }

 private:
  Moments<T> moments_;
  T count_, mean_ = T(0), along_ = T(0);
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
    Moments<T> of_h{T(0), T(1)};
    if (active && norms.gain_h) {
      of_h = moments(shared, G * H, eps, [&](int64_t i) { return value_or_zero<E>(p.h_gates, b * G * H + i); });
      if (thread_index() == 0) statistics[0] = of_h.mean, statistics[1] = of_h.inverse;
    }
    for (int64_t unit = thread_index(); unit < H; unit += kPointwiseThreads) {
      const States<T> before = states_before<Cell, E>(p, b * H + unit);
      States<T> s = before;
      if (active) {
        T x[G], r[G], saved[Cell::kSaved];
        FUSED_RNN_UNROLL
        for (int gate = 0; gate < G; ++gate) {
          const int64_t of_gate = gate * H + unit;
          x[gate] = value_or_zero<E>(p.x_gates, b * G * H + of_gate) + value_or_zero<E>(p.b_ih, of_gate);
          r[gate] = value_or_zero<E>(p.h_gates, b * G * H + of_gate);
          if (norms.gain_h) r[gate] = of_h.normalised(r[gate]) * value_or_zero<E>(norms.gain_h, of_gate);
          r[gate] += value_or_zero<E>(p.b_hh, of_gate);
        }
        Cell::forward(x, r, before.h, s.c, saved, s.h);
        save<Cell, E>(p, b, unit, before, saved);
        if constexpr (Cell::kHasC) {
          if (normalises_c) {  // h needs the whole row's c
            scratch[unit] = s.c, scratch[H + unit] = saved[3];
            continue;
          }
        }
      }
      leave<Cell, E>(p, b, unit, active, before, s);
    }
    if constexpr (Cell::kHasC) {
      if (!normalises_c) continue;
      const Moments<T> of_c = moments(shared, H, eps, [&](int64_t i) { return scratch[i]; });
      if (thread_index() == 0) statistics[2] = of_c.mean, statistics[3] = of_c.inverse;
      for (int64_t unit = thread_index(); unit < H; unit += kPointwiseThreads) {
        const T c = scratch[unit], gained = of_c.normalised(c) * value_or_zero<E>(norms.gain_c, unit);
        const T h = Cell::output(scratch[H + unit], gained + value_or_zero<E>(norms.bias_c, unit));
        leave<Cell, E>(p, b, unit, true, states_before<Cell, E>(p, b * H + unit), {h, c});
      }
    }
  }
}

// What h's gradient is to o's gate and to what tanh is applied to, the normalised c with gain and bias.
template <class T>
struct OutputGradients {
  T normalised_c, of_gate, of_gained;
};
template <class Cell, class E, class T = typename E::Arithmetic>
FUSED_RNN_DEVICE OutputGradients<T> output_backward(const StepNorms& norms, const Moments<T>& of_c, int64_t unit,
                                                    const Saved<Cell, T>& s, T dh) {
  OutputGradients<T> out{of_c.normalised(Cell::next_c(s.values, s.before.c)), T(0), T(0)};
  const T gained = out.normalised_c * value_or_zero<E>(norms.gain_c, unit) + value_or_zero<E>(norms.bias_c, unit);
  out.of_gained = Cell::output_backward(s.values[3], gained, dh, out.of_gate);
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
    const Moments<T> of_h{statistics[0], statistics[1]}, of_c{statistics[2], statistics[3]};
    NormalisedRow<T> row_h(of_h, G * H), row_c(of_c, H);

    // What reaches the states; the sums of the normalised c's gradients need all of it.
    for (int64_t unit = thread_index(); unit < H; unit += kPointwiseThreads) {
      const int64_t at = b * H + unit;
      States<T> d = from_step_after<Cell, E>(p, b, at);
      if (active) add_of_results<Cell, E>(p, b, unit, d);
      dh[at] = d.h;
      if constexpr (Cell::kHasC) {
        dc[at] = d.c;
        if (!normalises_c) continue;
        const T dh_new = parted(p.zone_h, share<E>(p.zone_h, b, unit), d.h).of_new;
        const OutputGradients<T> out =
            output_backward<Cell, E>(norms, of_c, unit, load_saved<Cell, E>(p, b, unit), dh_new);
        row_c.add(out.normalised_c, out.of_gained * value_or_zero<E>(norms.gain_c, unit));
      }
    }
    if (normalises_c) row_c.finish(shared);

    // The gates' gradients.
    for (int64_t unit = thread_index(); unit < H; unit += kPointwiseThreads) {
      const int64_t at = b * H + unit;
      States<T> d{dh[at], T(0)};
      if constexpr (Cell::kHasC) d.c = dc[at];
      T grads[Cell::kGrads] = {};
      if (active) {
        const Saved<Cell, T> s = load_saved<Cell, E>(p, b, unit);
        const Parted<T> of_new_h = parted(p.zone_h, share<E>(p.zone_h, b, unit), d.h);
        const Parted<T> of_new_c = parted(p.zone_c, share<E>(p.zone_c, b, unit), d.c);
        d = {T(0), of_new_c.of_new};
        if (!normalises_c) Cell::backward(s.values, s.before.h, s.before.c, of_new_h.of_new, d.c, grads, d.h);
        if constexpr (Cell::kHasC) {
          if (normalises_c) {
            const OutputGradients<T> out = output_backward<Cell, E>(norms, of_c, unit, s, of_new_h.of_new);
            T* const dnorm = static_cast<T*>(params.dnorm_c) + b * 2 * H + unit;
            dnorm[0] += out.of_gained * out.normalised_c, dnorm[H] += out.of_gained;
            d.c += row_c.backward(out.normalised_c, out.of_gained * value_or_zero<E>(norms.gain_c, unit));
            Cell::gates_backward(s.values, s.before.c, d.c, grads);
            grads[3] = out.of_gate;
          }
        }
        d.h += of_new_h.of_old, d.c += of_new_c.of_old;
      }
      store_gradients<Cell, E>(p, b, unit, d, grads);
      if (!normalises_h) continue;
      FUSED_RNN_UNROLL
      for (int gate = 0; gate < G; ++gate) {
        const int64_t of_gate = gate * H + unit, in_row = b * G * H + of_gate;
        const T normalised = of_h.normalised(value_or_zero<E>(params.h_gates, in_row));
        const T grad = grads[Cell::kHiddenGrads + gate];
        static_cast<T*>(params.dgain_h)[in_row] += grad * normalised;
        row_h.add(normalised, grad * value_or_zero<E>(norms.gain_h, of_gate));
      }
    }
    if (!norms.gain_h) continue;
    if (normalises_h) row_h.finish(shared);

    // And those of the sums before normalisation.
    for (int64_t i = thread_index(); i < G * H; i += kPointwiseThreads) {
      const int64_t in_row = b * G * H + i, hidden = b * Cell::kGrads * H + Cell::kHiddenGrads * H + i;
      T d = T(0);
      if (normalises_h) {
        const T grad = value_or_zero<E>(p.dgates, hidden) * value_or_zero<E>(norms.gain_h, i);
        d = row_h.backward(of_h.normalised(value_or_zero<E>(params.h_gates, in_row)), grad);
      }
      store_value<E>(params.dh_gates, in_row, d);
    }
  }
}

}  // namespace cuda
}  // namespace fused_rnn
