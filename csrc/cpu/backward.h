// Backward of one layer in one direction: the steps in the opposite order of forward, by the same team.
//
// A step multiplies the gates' gradients of the step after it by W_hh, adds what comes from outside, and
// runs the cell's backward on the accumulators. The weights' gradients are left to one product over many steps.
// With layer normalisation the sums are stored, and cell and normalisation are derived row by row on them.
#pragma once

#include "../cells/cells.h"
#include "layer_norm.h"
#include "tile.h"
#include "worker.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

template <class Cell, class T>
struct BackwardWorkspace {
  int64_t recurrent, projection, direct, dh, zeros, size;

  explicit BackwardWorkspace(const LayerShape& s) {
    const int64_t K = Cell::kGates * s.H;
    recurrent = 0;
    projection = recurrent + in_vectors<T>(s.P) * K;
    direct = projection + (s.projected ? in_vectors<T>(s.H) * s.P : 0);
    dh = direct + (Cell::kUsesH || s.zones_h ? s.B * s.P : 0);
    zeros = dh + (s.normalised ? s.B * 2 * s.H : 0);
    size = zeros + (K > s.P ? K : s.P);
  }
};

template <class Cell, class T>
class Backward {
 public:
  Backward(const BackwardParams& params, int64_t direction, const cpu::Worker& worker)
      : s_(params.shape),
        d_(params.direction[direction]),
        packed_(s_.N >= kRowsWorthPacking && s_.B > 1),
        goes_on_(params.goes_on),
        reverse_(direction == 1),
        worker_(worker),
        row_begin_(worker.splits_units ? 0 : worker.begin(s_.B)),
        row_end_(worker.splits_units ? s_.B : worker.end(s_.B)) {
    T* workspace = static_cast<T*>(d_.workspace);
    const BackwardWorkspace<Cell, T> part(s_);
    recurrent_ = workspace + part.recurrent;
    projection_ = workspace + part.projection;
    direct_ = workspace + part.direct;
    dh_ = workspace + part.dh;
    zeros_ = workspace + part.zeros;
  }

  void operator()() {
    if (!goes_on_) pack();
    worker_.wait();
    for (int64_t i = 0; i < s_.T; ++i) step(reverse_ ? i : s_.T - 1 - i);
    if (d_.dh0) initial_state();
    if (s_.resets && d_.dreset.h) reset_states();
  }

 private:
  static constexpr int U = kUnitVectors<1>;
  static constexpr int64_t kBlock = U * kLanes<T>;

  static T* at(void* p) { return static_cast<T*>(p); }
  static const T* at(const void* p) { return static_cast<const T*>(p); }

  int64_t first(int64_t n) const { return worker_.splits_units ? worker_.begin(n) : 0; }
  int64_t last(int64_t n) const { return worker_.splits_units ? worker_.end(n) : n; }

  int64_t gates() const { return Cell::kGates * s_.H; }

  void pack() {
    if (s_.T > 1 || d_.dh0 || d_.dreset.h) pack_columns_of(recurrent_, at(d_.w_hh), gates(), s_.P);
    if (s_.projected) pack_columns_of(projection_, at(d_.w_hr), s_.P, s_.H);
    if (worker_.index == 0) {
      const int64_t count = gates() > s_.P ? gates() : s_.P;
      for (int64_t i = 0; i < count; ++i) zeros_[i] = 0;
    }
  }

  // The panels of W [K, N]. Where W serves as it lies, only the last block is copied, which would end beyond a row.
  void pack_columns_of(T* panels, const T* W, int64_t K, int64_t N) {
    const int64_t blocks = ceil_div(N, kBlock), whole = N / kBlock;
    for (int64_t b = worker_.begin(blocks); b < worker_.end(blocks); ++b) {
      if (packed_ || b >= whole) pack_columns(panels + b * K * kBlock, Rows<const T>{W, N}, K, N, b * kBlock);
    }
  }

  // sums += rows [K] x W [K, N] for a part.
  void add_product(Sums<T, U>& sums, const Part& part, const T* const* rows, const T* panels, const void* W, int64_t K,
                   int64_t N) const {
    const int64_t left = N - part.block * kBlock;
    const int vectors = block_vectors<T, 1>(N, part.block * kBlock);
    if (packed_ || left < kBlock) {
      multiply<T, U>(sums, part, rows, {panels + part.block * K * kBlock, vectors * kLanes<T>, K * kBlock, vectors}, K);
    } else {
      multiply<T, U>(sums, part, rows, {at(W) + part.block * kBlock, N, kBlock, vectors}, K);
    }
  }

  static void clear(Sums<T, U>& sums, const Part& part) {
    for (int slot = 0; slot < part.slots(); ++slot) {
      for (int u = 0; u < U; ++u) sums[slot][u] = Vec<T>{};
    }
  }

  // Rows at and after `continued_` took their last step here: they get dh_n; the others the next step's gradients.
  void enter(int64_t t) {
    t_ = t;
    rows_ = s_.rows(t);
    if (reverse_) {
      continued_ = t == 0 ? 0 : rows_;
      next_ = continued_ ? dproduct(s_.row(t - 1)) : nullptr;
    } else {
      continued_ = t == s_.T - 1 ? 0 : s_.rows(t + 1);
      next_ = continued_ ? dproduct(s_.row(t + 1)) : nullptr;
    }
  }

  T* dgates(int64_t row) const { return at(d_.dgates) + row * Cell::kGrads * s_.H; }

  // The gradient of W_hh h, [G*H]; its rows are dproduct_stride() apart.
  const T* dproduct(int64_t row) const {
    return s_.normalised ? at(d_.dproduct) + row * gates() : dgates(row) + Cell::kHiddenGrads * s_.H;
  }
  int64_t dproduct_stride() const { return s_.normalised ? gates() : Cell::kGrads * s_.H; }

  const T* next_dproduct(int64_t b) const {
    const bool goes_on = b < continued_ && !s_.reset(reverse_ ? t_ - 1 : t_ + 1, b, reverse_);
    return goes_on ? next_ + b * dproduct_stride() : zeros_;
  }

  // Whether a step passes gradients to the h before it other than through W_hh.
  bool passes_directly() const { return Cell::kUsesH || s_.zones_h; }

  // What reaches h of row b other than through the next step's gates, before dy; null: nothing.
  const T* beside(int64_t b) const {
    if (b >= continued_) return d_.dh_n ? at(d_.dh_n) + s_.state(b) * s_.P : nullptr;
    return passes_directly() ? direct_ + b * s_.P : nullptr;
  }

  // Whether anything reads h of row b after this step. What nobody reads has no gradient, not one of zero: zero times
  // a NaN or an infinity in the row would be NaN.
  bool is_read(int64_t b) const { return b < continued_ || d_.dy || d_.dh_n; }

  void step(int64_t t) {
    enter(t);
    const int64_t row_end = least(row_end_, rows_);
    each_part(row_end, s_.P, [&](const Part& part) { hidden(part); });
    if (s_.projected) {
      if (worker_.splits_units) worker_.wait();
      each_part(row_end, s_.H, [&](const Part& part) { unproject(part); });
    }
    for (int64_t b = row_begin_; s_.normalised && b < row_end; ++b) normalised(b);
    if (worker_.splits_units) worker_.wait();
  }

  // This worker's parts of rows up to row_end and of n columns.
  template <class Run>
  FUSED_RNN_INLINE void each_part(int64_t row_end, int64_t n, const Run& run) const {
    const int64_t blocks = ceil_div(n, kBlock);
    cover<U>(row_begin_, row_end, first(blocks), last(blocks), n % kBlock != 0, run);
  }

  // The gradient of h after this step: the next step's gates times W_hh, and what comes beside.
  void hidden(const Part& part) const {
    Sums<T, U> sums;
    clear(sums, part);
    if (part.row < continued_) {
      const T* rows[kChunk];
      for (int r = 0; r < part.rows; ++r) rows[r] = next_dproduct(part.row + r);
      add_product(sums, part, rows, recurrent_, d_.w_hh, gates(), s_.P);
    }
    each_vector<T, U>(part, s_.P, [&](int slot, int u, Units units) FUSED_RNN_INLINED {
      const int64_t b = part.row_of(slot), unit = units.unit, n = units.count;
      Vec<T> dh = through_dropout(sums[slot][u], b, units);
      if (const T* more = beside(b)) dh += load(more + unit, n);
      if (d_.dy) dh += load(at(d_.dy) + s_.place(s_.row(t_) + b) * d_.dy_stride + unit, n);
      if (s_.zones_h) dh = unmix(dh, b, units);
      if (s_.projected) {
        store(at(d_.dh_total) + (s_.row(t_) + b) * s_.P + unit, dh, n);
      } else {
        take(dh, b, units);
      }
    });
  }

  FUSED_RNN_INLINE Vec<T> through_dropout(const Vec<T>& dh, int64_t b, Units units) const {
    return s_.drops_h ? dh * load(at(d_.variant.drop_h) + s_.state(b) * s_.P + units.unit, units.count) : dh;
  }

  // Of the gradient of a mixed h what belongs to the new one; the old one's goes to where the step came from.
  FUSED_RNN_INLINE Vec<T> unmix(const Vec<T>& dh, int64_t b, Units units) const {
    const int64_t unit = units.unit, n = units.count, row = s_.row(t_) + b;
    const Vec<T> of_new = dh * load(at(d_.variant.zone_h) + s_.place(row) * d_.variant.zone_h_stride + unit, n);
    Vec<T> of_old = dh - of_new;
    if (s_.reset(t_, b, reverse_)) {
      add_to(d_.dreset.h, t_ * d_.dreset.step_h + s_.state(b) * s_.P + unit, of_old, n);
      of_old = Vec<T>{};
    }
    store(direct_ + b * s_.P + unit, of_old, n);
    return of_new;
  }

  FUSED_RNN_INLINE void take(const Vec<T>& dh, int64_t b, Units units) const {
    if (s_.normalised) {
      store(dh_ + b * 2 * s_.H + units.unit, dh, units.count);
    } else {
      cell(dh, b, units);
    }
  }

  // Row b behind normalised sums: its cell, and then the gradient of the sums as they were before.
  void normalised(int64_t b) const {
    T* dh = dh_ + b * 2 * s_.H;
    const int64_t row = s_.row(t_) + b;
    if constexpr (Cell::kHasC) {
      if (is_read(b)) {
        output(dh, row);
      } else {
        __builtin_memset(dh, 0, 2 * s_.H * sizeof(T));
        __builtin_memset(at(d_.dnormal) + row * 2 * s_.H, 0, 2 * s_.H * sizeof(T));
      }
    }
    each_lanes<T>(s_.H, [&](int64_t i, int64_t n) { cell(load(dh + i, n), b, {i, n}); });
    const T* hat = at(d_.reserve.h_hat) + row * d_.reserve.stride;
    normalise_backward(at(d_.dproduct) + row * gates(), dgates(row) + Cell::kHiddenGrads * s_.H, at(d_.variant.norm_hh),
                       hat, hat[gates()], gates());
  }

  // h = o * tanh(norm_c * LN(c') + norm_c_bias): dh becomes the gradient of c', and behind it lies that of o's gate.
  void output(T* dh, int64_t row) const {
    T *hat = at(d_.dnormal) + row * 2 * s_.H, *d_inner = hat + s_.H;
    const Reserve& kept = d_.reserve;
    const T *norm_c = at(d_.variant.norm_c), *norm_c_bias = at(d_.variant.norm_c_bias);
    const T *gates = at(kept.gates) + row * kept.stride, *c_prev = at(kept.c_prev) + row * kept.stride;
    each_lanes<T>(s_.H, [&](int64_t i, int64_t n) {
      Vec<T> saved[Cell::kSaved];
      for (int k = 0; k < Cell::kSaved; ++k) saved[k] = load(gates + k * s_.H + i, n);
      store(hat + i, Cell::next_c(saved, load(c_prev + i, n)), n);
    });
    const T inverse = normalise(hat, s_.H);
    each_lanes<T>(s_.H, [&](int64_t i, int64_t n) {
      const Vec<T> inner = load(norm_c + i, n) * load(hat + i, n) + load(norm_c_bias + i, n);
      Vec<T> grad_o;
      store(d_inner + i, Cell::output_backward(load(gates + 3 * s_.H + i, n), inner, load(dh + i, n), grad_o), n);
      store(dh + s_.H + i, grad_o, n);
    });
    normalise_backward(dh, d_inner, norm_c, hat, inverse, s_.H);
    each_lanes<T>(s_.H, [&](int64_t i, int64_t n) { store(hat + i, load(hat + i, n) * load(d_inner + i, n), n); });
  }

  void unproject(const Part& part) const {
    Sums<T, U> sums;
    clear(sums, part);
    const T* rows[kChunk];
    for (int r = 0; r < part.rows; ++r) rows[r] = at(d_.dh_total) + (s_.row(t_) + part.row + r) * s_.P;
    add_product(sums, part, rows, projection_, d_.w_hr, s_.P, s_.H);
    each_vector<T, U>(part, s_.H, [&](int slot, int u, Units units) { take(sums[slot][u], part.row_of(slot), units); });
  }

  FUSED_RNN_INLINE void cell(const Vec<T>& dh, int64_t b, Units units) const {
    using V = Vec<T>;
    const int64_t unit = units.unit, n = units.count;
    const Reserve& kept = d_.reserve;
    const int64_t row = s_.row(t_) + b, state = s_.state(b) * s_.H + unit;
    const T* gates = at(kept.gates) + row * kept.stride + unit;
    V saved[Cell::kSaved], grads[Cell::kGrads], h_prev{}, c_prev{}, dc{}, dh_prev{};
    for (int i = 0; i < Cell::kSaved; ++i) saved[i] = load(gates + i * s_.H, n);
    if constexpr (Cell::kUsesH) {
      h_prev = load(at(kept.h_direct ? kept.h_direct : kept.h_prev) + row * kept.stride + unit, n);
    }
    if constexpr (Cell::kHasC) {
      c_prev = load(at(kept.c_prev) + row * kept.stride + unit, n);
      dc = load(at(d_.dc) + state, n);
      if (d_.dc_sequence) dc += load(at(d_.dc_sequence) + s_.place(row) * s_.directions * s_.H + unit, n);
    }
    V dc_old{};
    if constexpr (Cell::kHasC) {
      if (d_.variant.zone_c) {
        const V zone = load(at(d_.variant.zone_c) + s_.place(row) * d_.variant.zone_c_stride + unit, n);
        dc_old = dc - dc * zone;
        dc = dc * zone;
      }
    }
    if (Cell::kHasC && s_.normalised) {
      if constexpr (Cell::kHasC) {
        dc += dh;  // see output()
        Cell::gates_backward(saved, c_prev, dc, grads);
        grads[3] = load(dh_ + b * 2 * s_.H + s_.H + unit, n);
      }
    } else if (Cell::kHasC && !is_read(b)) {
      if constexpr (Cell::kHasC) {
        Cell::gates_backward(saved, c_prev, dc, grads);
        grads[3] = V{};
      }
    } else {
      Cell::backward(saved, h_prev, c_prev, dh, dc, grads, dh_prev);
    }
    dc += dc_old;
    T* out = dgates(row) + unit;
    for (int i = 0; i < Cell::kGrads; ++i) store(out + i * s_.H, grads[i], n);
    if (s_.reset(t_, b, reverse_)) {  // what goes back from here reaches the state that came in its place
      if constexpr (Cell::kHasC) add_to(d_.dreset.c, t_ * d_.dreset.step_c + state, dc, n);
      if constexpr (Cell::kUsesH) add_to(d_.dreset.h, t_ * d_.dreset.step_h + state, dh_prev, n);
      dc = dh_prev = V{};
    }
    if constexpr (Cell::kHasC) store(at(d_.dc) + state, dc, n);
    if constexpr (Cell::kUsesH) {
      T* direct = direct_ + b * s_.P + unit;
      store(direct, s_.zones_h ? dh_prev + load(direct, n) : dh_prev, n);
    }
  }

  static void add_to(void* sums, int64_t index, const Vec<T>& more, int64_t n) {
    if (sums) store(at(sums) + index, load(at(sums) + index, n) + more, n);
  }

  // dh0: every row's first step, whichever that was, seen from the state before it.
  void initial(const Part& part) const {
    Sums<T, U> sums;
    clear(sums, part);
    const T* rows[kChunk];
    for (int r = 0; r < part.rows; ++r) {
      const T* first = first_dproduct(part.row + r);
      rows[r] = first ? first : zeros_;
    }
    add_product(sums, part, rows, recurrent_, d_.w_hh, gates(), s_.P);
    each_vector<T, U>(part, s_.P, [&](int slot, int u, Units units) {
      const int64_t b = part.row_of(slot);
      Vec<T> dh = through_dropout(sums[slot][u], b, units);
      if (passes_directly()) dh += load(direct_ + b * s_.P + units.unit, units.count);
      store(at(d_.dh0) + s_.state(b) * s_.P + units.unit, dh, units.count);
    });
  }

  const T* first_dproduct(int64_t b) const {
    int64_t t = reverse_ ? s_.T - 1 : 0;
    while (b >= s_.rows(t)) --t;  // never at t = 0, where every row is active
    return s_.reset(t, b, reverse_) ? nullptr : dproduct(s_.row(t) + b);
  }

  void initial_state() {
    each_part(row_end_, s_.P, [&](const Part& part) { initial(part); });
  }

  // What reaches the states that came in at resets through the gates.
  void reset_states() {
    for (t_ = 0; t_ < s_.T; ++t_) {
      const int64_t row_end = least(row_end_, s_.rows(t_));
      bool any = false;
      for (int64_t b = row_begin_; b < row_end; ++b) any = any || s_.reset(t_, b, reverse_);
      if (any) each_part(row_end, s_.P, [&](const Part& part) { reset_state(part); });
    }
  }

  void reset_state(const Part& part) const {
    Sums<T, U> sums;
    clear(sums, part);
    const T* rows[kChunk];
    for (int r = 0; r < part.rows; ++r) {
      const int64_t b = part.row + r;
      rows[r] = s_.reset(t_, b, reverse_) ? dproduct(s_.row(t_) + b) : zeros_;
    }
    add_product(sums, part, rows, recurrent_, d_.w_hh, gates(), s_.P);
    each_vector<T, U>(part, s_.P, [&](int slot, int u, Units units) {
      const int64_t b = part.row_of(slot);
      const Vec<T> dh = through_dropout(sums[slot][u], b, units);
      add_to(d_.dreset.h, t_ * d_.dreset.step_h + s_.state(b) * s_.P + units.unit, dh, units.count);
    });
  }

  const LayerShape& s_;
  const BackwardDirection& d_;
  const bool packed_, goes_on_, reverse_;
  const cpu::Worker& worker_;
  const int64_t row_begin_, row_end_;
  T *recurrent_, *projection_, *direct_, *dh_, *zeros_;
  int64_t t_ = 0, rows_ = 0, continued_ = 0;
  const T* next_ = nullptr;
};

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
