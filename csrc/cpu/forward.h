// Forward of one layer in one direction, by a team of threads that splits the rows or the hidden units.
//
// A step multiplies the previous h by the packed W_hh and runs the cell on the sums while they are in the first-level
// cache; h goes to y, where the next step reads it. A sequence of one step finds the product made already. With a
// projection the cell's output goes to `hidden` and a second product makes h.
#pragma once

#include "../cells/cells.h"
#include "tile.h"
#include "worker.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// Where the parts of a direction's workspace begin, in elements.
template <class Cell, class T>
struct ForwardWorkspace {
  int64_t panel, input, bias, projection, hidden, zeros, size;

  explicit ForwardWorkspace(const LayerShape& s) {
    const int64_t blocks = ceil_div(s.H, kUnitVectors<Cell::kGates> * kLanes<T>);
    const int64_t columns = Cell::kGates * kUnitVectors<Cell::kGates> * kLanes<T>;
    panel = 0;
    input = panel + (s.T > 1 ? blocks * columns * s.P : 0);
    bias = input + blocks * columns * s.I;
    projection = bias + blocks * columns * 2;
    const int64_t outputs = s.projected ? ceil_div(s.P, kUnitVectors<1> * kLanes<T>) * kUnitVectors<1> * kLanes<T> : 0;
    hidden = projection + outputs * s.H;
    zeros = hidden + (s.projected ? s.B * s.H : 0);
    size = zeros + s.P;
  }
};

template <class Cell, class T>
class Forward {
 public:
  Forward(const LayerShape& shape, const ForwardDirection& direction, bool reverse, const cpu::Worker& worker)
      : s_(shape),
        d_(direction),
        reverse_(reverse),
        worker_(worker),
        row_begin_(worker.splits_units ? 0 : worker.begin(shape.B)),
        row_end_(worker.splits_units ? shape.B : worker.end(shape.B)) {
    T* workspace = static_cast<T*>(d_.workspace);
    const ForwardWorkspace<Cell, T> part(shape);
    panel_ = workspace + part.panel;
    input_ = workspace + part.input;
    bias_ = workspace + part.bias;
    projection_ = workspace + part.projection;
    scratch_hidden_ = workspace + part.hidden;
    zeros_ = workspace + part.zeros;
  }

  void operator()() {
    pack();
    worker_.wait();
    for (int64_t i = 0; i < s_.T; ++i) {
      const int64_t t = reverse_ ? s_.T - 1 - i : i;
      step(t);
    }
    if (d_.h_n) finish();
  }

 private:
  static constexpr int U = kUnitVectors<Cell::kGates>, C = Cell::kGates * U;
  static constexpr int64_t kBlock = U * kLanes<T>;  // units of a block of gates
  static constexpr int UP = kUnitVectors<1>;        // the same for the projection
  static constexpr int64_t kProjectionBlock = UP * kLanes<T>;

  static T* at(void* p) { return static_cast<T*>(p); }
  static const T* at(const void* p) { return static_cast<const T*>(p); }

  // The share of n blocks whose products this worker computes.
  int64_t first(int64_t n) const { return worker_.splits_units ? worker_.begin(n) : 0; }
  int64_t last(int64_t n) const { return worker_.splits_units ? worker_.end(n) : n; }

  void pack() {
    const int64_t blocks = ceil_div(s_.H, kBlock);
    for (int64_t b = worker_.begin(blocks); b < worker_.end(blocks); ++b) {
      if (s_.T > 1) {
        pack_rows<T, Cell::kGates>(panel_ + b * s_.P * C * kLanes<T>, at(d_.w_hh), s_.H, s_.P, b * kBlock);
      }
      if (s_.I > 0) pack_rows<T, Cell::kGates>(input_ + b * s_.I * C * kLanes<T>, at(d_.w_ih), s_.H, s_.I, b * kBlock);
      pack_bias(bias_ + b * 2 * C * kLanes<T>, at(d_.b_ih), b * kBlock);
      pack_bias(bias_ + (b * 2 + 1) * C * kLanes<T>, at(d_.b_hh), b * kBlock);
    }
    if (s_.projected) {
      const int64_t outputs = ceil_div(s_.P, kProjectionBlock);
      for (int64_t b = worker_.begin(outputs); b < worker_.end(outputs); ++b) {
        T* panel = projection_ + b * s_.H * kProjectionBlock;
        pack_rows<T, 1>(panel, at(d_.w_hr), s_.P, s_.H, b * kProjectionBlock);
      }
    }
    if (worker_.index == 0) {
      for (int64_t i = 0; i < s_.P; ++i) zeros_[i] = 0;
    }
  }

  void pack_bias(T* out, const T* bias, int64_t unit) {
    for (int g = 0; g < Cell::kGates; ++g) {
      for (int u = 0; u < U; ++u) {
        const int64_t first = unit + u * kLanes<T>;
        const int64_t n = s_.H - first < kLanes<T> ? s_.H - first : kLanes<T>;
        store(out + (g * U + u) * kLanes<T>, bias && n > 0 ? load(bias + g * s_.H + first, n) : Vec<T>{});
      }
    }
  }

  // Rows at and after `carried_` begin at this step: what they consume is h0, not the previous step's h.
  void enter(int64_t t) {
    t_ = t;
    rows_ = s_.rows(t);
    if (reverse_) {
      carried_ = t == s_.T - 1 ? 0 : s_.rows(t + 1);
      previous_ = carried_ ? at(d_.y) + s_.row(t + 1) * d_.y_stride : nullptr;
    } else {
      carried_ = t == 0 ? 0 : rows_;
      previous_ = carried_ ? at(d_.y) + s_.row(t - 1) * d_.y_stride : nullptr;
    }
  }

  const T* h_prev(int64_t b) const {
    if (b < carried_) return previous_ + b * d_.y_stride;
    return d_.h0 ? at(d_.h0) + b * s_.P : zeros_;
  }

  const T* made_product(int64_t b, int64_t gate) const { return at(d_.recurrent) + (b * Cell::kGates + gate) * s_.H; }

  T* hidden(int64_t b) const {
    return d_.reserve.hidden ? at(d_.reserve.hidden) + (s_.row(t_) + b) * d_.reserve.stride
                             : scratch_hidden_ + b * s_.H;
  }

  void step(int64_t t) {
    enter(t);
    const int64_t row_end = row_end_ < rows_ ? row_end_ : rows_;
    const int64_t blocks = ceil_div(s_.H, kBlock);
    cover<C>(Gates{*this}, row_begin_, row_end, first(blocks), last(blocks));
    if (d_.reserve.h_prev) keep_h_prev(row_end);
    if (s_.projected) {
      if (worker_.splits_units) worker_.wait();
      const int64_t outputs = ceil_div(s_.P, kProjectionBlock);
      cover<UP>(Projection{*this}, row_begin_, row_end, first(outputs), last(outputs));
    }
    if (worker_.splits_units) worker_.wait();
  }

  void keep_h_prev(int64_t row_end) {
    const int64_t from = first(s_.P), count = last(s_.P) - from;
    for (int64_t b = row_begin_; b < row_end; ++b) {
      T* out = at(d_.reserve.h_prev) + (s_.row(t_) + b) * d_.reserve.stride + from;
      __builtin_memcpy(out, h_prev(b) + from, count * sizeof(T));
    }
  }

  // h_n: each row's h after the step that was its last.
  void finish() {
    const int64_t from = first(s_.P), count = last(s_.P) - from;
    int64_t t = reverse_ ? 0 : s_.T - 1;
    for (int64_t b = row_begin_; b < row_end_; ++b) {
      while (b >= s_.rows(t)) --t;
      const T* h = at(d_.y) + (s_.row(t) + b) * d_.y_stride + from;
      __builtin_memcpy(at(d_.h_n) + b * s_.P + from, h, count * sizeof(T));
      if (!reverse_) t = s_.T - 1;
    }
  }

  struct Gates {
    const Forward& f;

    template <int NB, int R>
    FUSED_RNN_INLINE void run(int64_t row, int64_t block) const {
      using V = Vec<T>;
      const LayerShape& s = f.s_;
      const T *rows[R], *x[R];
      for (int r = 0; r < R; ++r) rows[r] = f.h_prev(row + r);
      const T* bias = f.bias_ + block * 2 * C * kLanes<T>;
      V from_h[NB][R][C], from_x[NB][R][C];
      for (int nb = 0; nb < NB; ++nb) {
        for (int c = 0; c < C; ++c) {
          const V b_ih = load(bias + (nb * 2 * C + c) * kLanes<T>),
                  b_hh = load(bias + ((nb * 2 + 1) * C + c) * kLanes<T>);
          for (int r = 0; r < R; ++r) from_x[nb][r][c] = b_ih, from_h[nb][r][c] = b_hh;
        }
      }
      if (s.T > 1) multiply(from_h, rows, f.panel_ + block * s.P * C * kLanes<T>, s.P);
      if (s.I > 0) {
        for (int r = 0; r < R; ++r) x[r] = at(f.d_.x) + (s.row(f.t_) + row + r) * s.I;
        multiply(from_x, x, f.input_ + block * s.I * C * kLanes<T>, s.I);
      }
      each_vector<T, NB, U>(block, s.H, [&](int nb, int u, Units units) {
        for (int r = 0; r < R; ++r) {
          V input[Cell::kGates], recurrent[Cell::kGates];
          for (int g = 0; g < Cell::kGates; ++g) {
            input[g] = from_x[nb][r][g * U + u];
            recurrent[g] = from_h[nb][r][g * U + u];
            if (s.I == 0) input[g] += load(f.gates(row + r) + g * s.H + units.unit, units.count);
            if (f.d_.recurrent) recurrent[g] += load(f.made_product(row + r, g) + units.unit, units.count);
          }
          f.cell(input, recurrent, rows[r], row + r, units);
        }
      });
    }
  };

  T* gates(int64_t b) const { return at(d_.reserve.gates) + (s_.row(t_) + b) * d_.reserve.stride; }

  // The cell of some units of row b at this step, from the two halves of the pre-activations.
  FUSED_RNN_INLINE void cell(const Vec<T> (&input)[Cell::kGates], const Vec<T> (&recurrent)[Cell::kGates],
                             const T* h_prev, int64_t b, Units units) const {
    using V = Vec<T>;
    const int64_t unit = units.unit, n = units.count;
    const Reserve& keep = d_.reserve;
    const int64_t row = s_.row(t_) + b;
    V saved[Cell::kSaved], h, h_in{}, c{};
    if constexpr (Cell::kUsesH) h_in = load(h_prev + unit, n);
    if constexpr (Cell::kHasC) {
      c = load(at(d_.c) + b * s_.H + unit, n);
      if (keep.c_prev) store(at(keep.c_prev) + row * keep.stride + unit, c, n);
    }
    Cell::forward(input, recurrent, h_in, c, saved, h);
    if constexpr (Cell::kHasC) store(at(d_.c) + b * s_.H + unit, c, n);
    if (keep.h_prev) {
      for (int i = 0; i < Cell::kSaved; ++i) store(gates(b) + i * s_.H + unit, saved[i], n);
    }
    store(s_.projected ? hidden(b) + unit : at(d_.y) + row * d_.y_stride + unit, h, n);
  }

  struct Projection {
    const Forward& f;

    template <int NB, int R>
    FUSED_RNN_INLINE void run(int64_t row, int64_t block) const {
      const LayerShape& s = f.s_;
      const T* rows[R];
      for (int r = 0; r < R; ++r) rows[r] = f.hidden(row + r);
      Vec<T> sums[NB][R][UP] = {};
      multiply(sums, rows, f.projection_ + block * s.H * kProjectionBlock, s.H);
      each_vector<T, NB, UP>(block, s.P, [&](int nb, int u, Units units) {
        for (int r = 0; r < R; ++r) {
          T* h = at(f.d_.y) + (s.row(f.t_) + row + r) * f.d_.y_stride;
          store(h + units.unit, sums[nb][r][u], units.count);
        }
      });
    }
  };

  const LayerShape& s_;
  const ForwardDirection& d_;
  const bool reverse_;
  const cpu::Worker& worker_;
  const int64_t row_begin_, row_end_;
  T *panel_, *input_, *bias_, *projection_, *scratch_hidden_, *zeros_;
  int64_t t_ = 0, rows_ = 0, carried_ = 0;
  const T* previous_ = nullptr;
};

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
