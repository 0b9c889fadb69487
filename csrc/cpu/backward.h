// Backward of one layer in one direction: the steps in the opposite order of forward, by the same team.
//
// A step multiplies the gates' gradients of the step after it by the packed W_hh, adds what comes from outside, and
// runs the cell's backward on the accumulators. The weights' gradients are left to one product over all steps.
#pragma once

#include "../cells/cells.h"
#include "tile.h"
#include "worker.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

template <class Cell, class T>
struct BackwardWorkspace {
  int64_t panel, projection, direct, zeros, size;

  explicit BackwardWorkspace(const LayerShape& s) {
    const int64_t block = kUnitVectors<1> * kLanes<T>;
    const int64_t K = Cell::kGates * s.H;
    panel = 0;
    projection = panel + (s.T > 1 ? ceil_div(s.P, block) * block * K : 0);
    direct = projection + (s.projected ? ceil_div(s.H, block) * block * s.P : 0);
    zeros = direct + (Cell::kUsesH ? s.B * s.H : 0);
    size = zeros + (K > s.P ? K : s.P);
  }
};

template <class Cell, class T>
class Backward {
 public:
  Backward(const LayerShape& shape, const BackwardDirection& direction, bool reverse, const cpu::Worker& worker)
      : s_(shape),
        d_(direction),
        reverse_(reverse),
        worker_(worker),
        row_begin_(worker.splits_units ? 0 : worker.begin(shape.B)),
        row_end_(worker.splits_units ? shape.B : worker.end(shape.B)) {
    T* workspace = static_cast<T*>(d_.workspace);
    const BackwardWorkspace<Cell, T> part(shape);
    panel_ = workspace + part.panel;
    projection_ = workspace + part.projection;
    direct_ = s_.T == 1 && d_.dh0 ? at(d_.dh0) : workspace + part.direct;
    zeros_ = workspace + part.zeros;
  }

  void operator()() {
    pack();
    worker_.wait();
    for (int64_t i = 0; i < s_.T; ++i) {
      const int64_t t = reverse_ ? i : s_.T - 1 - i;
      step(t);
    }
    if (d_.dh0 && s_.T > 1) initial_state();
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
    const int64_t blocks = ceil_div(s_.P, kBlock);
    // A single step has no step after it, and its dh0 is made from W_hh as it is.
    if (s_.T > 1) {
      for (int64_t b = worker_.begin(blocks); b < worker_.end(blocks); ++b) {
        pack_columns(panel_ + b * gates() * kBlock, at(d_.w_hh), gates(), s_.P, b * kBlock);
      }
    }
    if (s_.projected) {
      const int64_t units = ceil_div(s_.H, kBlock);
      for (int64_t b = worker_.begin(units); b < worker_.end(units); ++b) {
        pack_columns(projection_ + b * s_.P * kBlock, at(d_.w_hr), s_.P, s_.H, b * kBlock);
      }
    }
    if (worker_.index == 0) {
      const int64_t count = gates() > s_.P ? gates() : s_.P;
      for (int64_t i = 0; i < count; ++i) zeros_[i] = 0;
    }
  }

  // Rows at and after `continued_` took their last step here: they get dh_n; the others the next step's gradients.
  void enter(int64_t t) {
    t_ = t;
    rows_ = s_.rows(t);
    if (reverse_) {
      continued_ = t == 0 ? 0 : rows_;
      next_ = continued_ ? dgates(s_.row(t - 1)) : nullptr;
    } else {
      continued_ = t == s_.T - 1 ? 0 : s_.rows(t + 1);
      next_ = continued_ ? dgates(s_.row(t + 1)) : nullptr;
    }
  }

  T* dgates(int64_t row) const { return at(d_.dgates) + row * Cell::kGrads * s_.H; }

  const T* next_dgates(int64_t b) const {
    return b < continued_ ? next_ + b * Cell::kGrads * s_.H + Cell::kHiddenGrads * s_.H : zeros_;
  }

  // What reaches h of row b other than through the next step's gates, before dy.
  const T* beside(int64_t b) const {
    if (b >= continued_) return d_.dh_n ? at(d_.dh_n) + b * s_.P : zeros_;
    return Cell::kUsesH ? direct_ + b * s_.H : zeros_;
  }

  const T* dy(int64_t b) const { return d_.dy ? at(d_.dy) + (s_.row(t_) + b) * d_.dy_stride : zeros_; }

  void step(int64_t t) {
    enter(t);
    const int64_t row_end = row_end_ < rows_ ? row_end_ : rows_;
    const int64_t blocks = ceil_div(s_.P, kBlock);
    if (s_.projected) {
      cover<U>(Hidden<false>{*this}, row_begin_, row_end, first(blocks), last(blocks));
      if (worker_.splits_units) worker_.wait();
      const int64_t units = ceil_div(s_.H, kBlock);
      cover<U>(Unprojected{*this}, row_begin_, row_end, first(units), last(units));
    } else {
      cover<U>(Hidden<true>{*this}, row_begin_, row_end, first(blocks), last(blocks));
    }
    if (worker_.splits_units) worker_.wait();
  }

  // The gradient of h after this step's row: the next step's gates times W_hh, and what comes beside.
  template <bool kCell>
  struct Hidden {
    const Backward& f;

    template <int NB, int R>
    FUSED_RNN_INLINE void run(int64_t row, int64_t block) const {
      const LayerShape& s = f.s_;
      const T* rows[R];
      for (int r = 0; r < R; ++r) rows[r] = f.next_dgates(row + r);
      Vec<T> sums[NB][R][U] = {};
      if (row < f.continued_) multiply(sums, rows, f.panel_ + block * f.gates() * kBlock, f.gates());
      each_vector<T, NB, U>(block, s.P, [&](int nb, int u, Units units) {
        for (int r = 0; r < R; ++r) {
          const int64_t b = row + r, unit = units.unit, n = units.count;
          const Vec<T> dh = sums[nb][r][u] + load(f.beside(b) + unit, n) + load(f.dy(b) + unit, n);
          if constexpr (kCell) {
            f.cell(dh, b, units);
          } else {
            store(at(f.d_.dh_total) + (s.row(f.t_) + b) * s.P + unit, dh, n);
          }
        }
      });
    }
  };

  struct Unprojected {
    const Backward& f;

    template <int NB, int R>
    FUSED_RNN_INLINE void run(int64_t row, int64_t block) const {
      const LayerShape& s = f.s_;
      const T* rows[R];
      for (int r = 0; r < R; ++r) rows[r] = at(f.d_.dh_total) + (s.row(f.t_) + row + r) * s.P;
      Vec<T> sums[NB][R][U] = {};
      multiply(sums, rows, f.projection_ + block * s.P * kBlock, s.P);
      each_vector<T, NB, U>(block, s.H, [&](int nb, int u, Units units) {
        for (int r = 0; r < R; ++r) f.cell(sums[nb][r][u], row + r, units);
      });
    }
  };

  FUSED_RNN_INLINE void cell(const Vec<T>& dh, int64_t b, Units units) const {
    using V = Vec<T>;
    const int64_t unit = units.unit, n = units.count;
    const Reserve& kept = d_.reserve;
    const int64_t row = s_.row(t_) + b;
    const T* gates = at(kept.gates) + row * kept.stride + unit;
    V saved[Cell::kSaved], grads[Cell::kGrads], h_prev{}, c_prev{}, dc{}, dh_prev{};
    for (int i = 0; i < Cell::kSaved; ++i) saved[i] = load(gates + i * s_.H, n);
    if constexpr (Cell::kUsesH) h_prev = load(at(kept.h_prev) + row * kept.stride + unit, n);
    if constexpr (Cell::kHasC) {
      c_prev = load(at(kept.c_prev) + row * kept.stride + unit, n);
      dc = load(at(d_.dc) + b * s_.H + unit, n);
    }
    Cell::backward(saved, h_prev, c_prev, dh, dc, grads, dh_prev);
    T* out = dgates(row) + unit;
    for (int i = 0; i < Cell::kGrads; ++i) store(out + i * s_.H, grads[i], n);
    if constexpr (Cell::kHasC) store(at(d_.dc) + b * s_.H + unit, dc, n);
    if constexpr (Cell::kUsesH) store(direct_ + b * s_.H + unit, dh_prev, n);
  }

  // dh0: every row's first step, whichever that was, seen from the state before it.
  struct Initial {
    const Backward& f;

    template <int NB, int R>
    FUSED_RNN_INLINE void run(int64_t row, int64_t block) const {
      const LayerShape& s = f.s_;
      const T* rows[R];
      for (int r = 0; r < R; ++r) rows[r] = f.first_dgates(row + r) + Cell::kHiddenGrads * s.H;
      Vec<T> sums[NB][R][U] = {};
      multiply(sums, rows, f.panel_ + block * f.gates() * kBlock, f.gates());
      each_vector<T, NB, U>(block, s.P, [&](int nb, int u, Units units) {
        for (int r = 0; r < R; ++r) {
          Vec<T> dh = sums[nb][r][u];
          if constexpr (Cell::kUsesH) dh += load(f.direct_ + (row + r) * s.H + units.unit, units.count);
          store(at(f.d_.dh0) + (row + r) * s.P + units.unit, dh, units.count);
        }
      });
    }
  };

  const T* first_dgates(int64_t b) const {
    int64_t t = reverse_ ? s_.T - 1 : 0;
    while (b >= s_.rows(t)) --t;  // never at t = 0, where every row is active
    return dgates(s_.row(t) + b);
  }

  void initial_state() {
    const int64_t blocks = ceil_div(s_.P, kBlock);
    cover<U>(Initial{*this}, row_begin_, row_end_, first(blocks), last(blocks));
  }

  const LayerShape& s_;
  const BackwardDirection& d_;
  const bool reverse_;
  const cpu::Worker& worker_;
  const int64_t row_begin_, row_end_;
  T *panel_, *projection_, *direct_, *zeros_;
  int64_t t_ = 0, rows_ = 0, continued_ = 0;
  const T* next_ = nullptr;
};

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
