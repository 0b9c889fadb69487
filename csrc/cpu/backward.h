// Backward of one layer in one direction, computed by a team of threads that splits the batch rows or the hidden units,
// as in forward. It visits the steps in the opposite order of forward. Comments call the step that it visited before
// the current one the next step, which it is in forward.
//
// A step multiplies the gate gradients of the next step by W_hh, block by block of units; then it adds the gradients of
// y (or h_n) and runs the cell's backward, row by row, so that what forward kept is read, and the gate gradients are
// written, in the order in which they lie in memory: with blocks of a few cache lines each the hardware fetches nothing
// ahead. A projection is a second product before the cell; a layer normalisation follows the cell, as a row's needs all
// of its units. gradients.h multiplies the gate gradients into the gradients of weights and inputs, with one product
// over many steps.
#pragma once

#include "../cells/cells.h"
#include "layer_norm.h"
#include "pack.h"
#include "tile.h"
#include "tile_operands.h"
#include "worker.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// How backward multiplies by the weights.
struct BackwardProducts {
  bool splits;  // whether they are packed into tiles: always, if products are on tiles
  bool packed;  // whether W_hh is packed into panels; W_hr follows it

  explicit BackwardProducts(const LayerShape& s)
      : splits(s.on_tiles()),
        packed(splits || (s.B > 1 && rows(s) >= rows_worth_copying(s.P * (s.dtype == Dtype::kFloat32 ? 4 : 8)))) {}

 private:
  // Rows that W_hh multiplies over all steps: the first step's only if h0 has a gradient, too.
  static int64_t rows(const LayerShape& s) { return s.T > 1 ? s.N - s.B : s.B; }
};

// Offsets of the parts of a direction's workspace, in elements.
template <class Cell, class T>
struct BackwardWorkspace {
  int64_t recurrent, projection, split, split_projection, direct, product, zeros, size;

  explicit BackwardWorkspace(const LayerShape& s) {
    const int64_t K = Cell::kGates * s.H;
    recurrent = 0;
    projection = recurrent + panels(s, K, s.P);
    split = ceil_div(projection + (s.projected ? panels(s, s.P, s.H) : 0), 16) * 16;
    const bool splits = BackwardProducts(s).splits;
    split_projection = split + (splits ? SplitRows::size(s.B, K, s.operands) : 0);
    direct = split_projection + (splits && s.projected ? SplitRows::size(s.B, s.P, s.operands) : 0);
    product = direct + (Cell::kUsesH || s.zones_h ? s.B * s.P : 0);
    zeros = product + s.B * product_width(s);
    size = zeros + K;
  }

  // Elements of a row of `product`: one of W_hh or of W_hr; with layer normalisation, two of the cell.
  static int64_t product_width(const LayerShape& s) {
    const int64_t of_cell = (s.normalised ? 2 : 1) * s.H;
    return s.P > of_cell ? s.P : of_cell;
  }

  // Elements of W [K, N], packed.
  static int64_t panels(const LayerShape& s, int64_t K, int64_t N) {
    constexpr int64_t units = kUnitVectors<1> * kLanes<T>;
    if (!BackwardProducts(s).splits) return in_vectors<T>(N) * K;
    return ceil_div(N, units) * SplitPanel::size(K, units, s.operands);
  }
};

template <class Cell, class T>
class Backward {
 public:
  Backward(const BackwardParams& params, int64_t direction, const cpu::Worker& worker)
      : s_(params.shape),
        d_(params.direction[direction]),
        packed_(BackwardProducts(s_).packed),
        splits_(BackwardProducts(s_).splits),
        accumulate_(params.accumulate),
        reverse_(direction == 1),
        worker_(worker),
        row_begin_(worker.splits_units ? 0 : worker.begin(s_.B)),
        row_end_(worker.splits_units ? s_.B : worker.end(s_.B)),
        tile_products_(s_.unit) {
    T* workspace = static_cast<T*>(d_.workspace);
    const BackwardWorkspace<Cell, T> part(s_);
    if constexpr (kSplits) {
      split_ = SplitRows(workspace + part.split, s_.B, row_begin_, row_end_, gates(), s_.operands);
      split_projection_ = SplitRows(workspace + part.split_projection, s_.B, row_begin_, row_end_, s_.P, s_.operands);
    }
    recurrent_ = workspace + part.recurrent;
    projection_ = workspace + part.projection;
    direct_ = workspace + part.direct;
    product_ = workspace + part.product;
    product_width_ = part.product_width(s_);
    zeros_ = workspace + part.zeros;
  }

  void operator()() {
    if (!accumulate_) pack();
    worker_.wait();
    for (int64_t i = 0; i < s_.T; ++i) step(reverse_ ? i : s_.T - 1 - i);
    if (d_.dh0) initial_gradients();
    if (s_.resets && d_.dreset.h) reset_gradients();
  }

 private:
  static constexpr int U = kUnitVectors<1>;
  static constexpr int64_t kBlock = U * kLanes<T>;
  static constexpr bool kSplits = sizeof(T) == sizeof(float);  // for tiles, if LayerShape::operands says so

  static T* at(void* p) { return static_cast<T*>(p); }
  static const T* at(const void* p) { return static_cast<const T*>(p); }

  int64_t gates() const { return Cell::kGates * s_.H; }

  void pack() {
    if (s_.T > 1 || d_.dh0 || d_.dreset.h) pack_weights(recurrent_, at(d_.w_hh), gates(), s_.P);
    if (s_.projected) pack_weights(projection_, at(d_.w_hr), s_.P, s_.H);
    if (worker_.index == 0) {
      for (int64_t i = 0; i < gates(); ++i) zeros_[i] = 0;
    }
  }

  // Packs this worker's share of the blocks of W [K, N]. If W is read unpacked, only a partial last block is packed,
  // since whole vectors of it would end beyond the row.
  void pack_weights(T* panels, const T* W, int64_t K, int64_t N) {
    if (packs_in_place()) return;
    const int64_t blocks = ceil_div(N, kBlock), whole = N / kBlock;
    for (int64_t b = worker_.begin(blocks); b < worker_.end(blocks); ++b) {
      if constexpr (kSplits) {
        if (splits_) {
          split_panel(panels, b, K, N).pack_columns(Rows<const T>{W, N}, K, N, b * kBlock);
          continue;
        }
      }
      if (packed_ || b >= whole) pack_columns(panels + b * K * kBlock, Rows<const T>{W, N}, K, N, b * kBlock);
    }
  }

  // Whether a block serves one step alone, of the worker that packs it: then it is packed just before, and all panels
  // take the place of the worker's first, which stays in the cache. There are several rows then, and so a part has one
  // block.
  bool packs_in_place() const { return s_.T == 1 && !d_.dh_chunk && packed_ && !splits_ && worker_.owns_blocks(); }

  SplitPanel split_panel(const T* panels, int64_t block, int64_t K, int64_t N) const {
    T* const panel = const_cast<T*>(panels) + block * SplitPanel::size(K, kBlock, s_.operands);
    return {panel, K, block_vectors<T, 1>(N, block * kBlock) * int(kLanes<T>), s_.operands};
  }

  // Splits rows [row_begin_, row_end) of a product's operand, if it is computed on tiles; row(b) points to row b.
  template <class Row>
  void split_rows(const SplitRows& rows, int64_t row_end, const Row& row) const {
    if constexpr (kSplits) {
      if (!splits_) return;
      rows.split(row_end, worker_, worker_.splits_units, row);
      if (worker_.splits_units) worker_.wait();
    }
  }

  // sums = rows x W [K, N] for a part, with the panels that pack_weights() made or left to be made here. `split` has
  // the rows' tiles.
  void multiply_by(Sums<T, U>& sums, const Part& part, const T* const* rows, const SplitRows& split, const T* panels,
                   const void* W, int64_t K, int64_t N) const {
    const int64_t left = N - part.block * kBlock;
    const int vectors = block_vectors<T, 1>(N, part.block * kBlock);
    if (splits_) {
      if constexpr (kSplits) {
        const int64_t unit = part.block * kBlock;
        clear<T, U>(sums, part.slots());
        tile_products_.add(
            sums, vectors, split, part.row, part.rows, split_panel(panels, part.block, K, N),
            [&](int r) { add_columns_in_float32(sums[r], rows[r], Rows<const T>{at(W), N}, N, K, unit); });
      }
    } else if (packed_ || left < kBlock) {
      const int64_t blocks = ceil_div(N, kBlock), next = part.block + (backwards() ? -1 : 1);
      const bool in_place = packs_in_place(), begins = part.row == row_begin_;
      const bool follows =
          packed_ && begins && !in_place && next >= worker_.first(blocks) && next < worker_.last(blocks);
      T* const panel = const_cast<T*>(panels) + (in_place ? worker_.first(blocks) : part.block) * K * kBlock;
      if (in_place && begins) pack_columns(panel, Rows<const T>{at(W), N}, K, N, part.block * kBlock);
      multiply<T, U>(sums, kFromZero<T>, part, rows,
                     {panel, vectors * kLanes<T>, K * kBlock, vectors, follows ? panels + next * K * kBlock : nullptr},
                     K);
    } else {
      multiply<T, U>(sums, kFromZero<T>, part, rows, {at(W) + part.block * kBlock, N, kBlock, vectors}, K);
    }
  }

  // Sets the current step. Its rows below continuing_rows_ also take part in the next step; for the others this is the
  // last step, and they receive dh_n.
  void begin_step(int64_t t) {
    t_ = t;
    next_ = reverse_ ? t - 1 : t + 1;
    rows_ = s_.rows(t);
    continuing_rows_ = 0 <= next_ && next_ < s_.T ? least(rows_, s_.rows(next_)) : 0;
  }

  T* dgates(int64_t row) const { return at(d_.dgates) + row * Cell::kGrads * s_.H; }

  // The gradient of W_hh h of row b at step t, [G*H].
  const T* dproduct(int64_t t, int64_t b) const {
    const int64_t row = s_.row(t) + b;
    return s_.normalised ? at(d_.dproduct) + row * gates() : dgates(row) + Cell::kHiddenGrads * s_.H;
  }
  // What of it passes on to the h before that step; zeros if the step read a reset state in its place.
  const T* passed_on(int64_t t, int64_t b) const { return s_.reset(t, b, reverse_) ? zeros_ : dproduct(t, b); }

  // Whether the gradient of h has a part that does not pass through W_hh.
  bool has_direct_gradient() const { return Cell::kUsesH || s_.zones_h; }

  // The gradient of h of row b that does not pass through W_hh, without dy; null: none.
  const T* direct_gradient(int64_t b) const {
    if (b >= continuing_rows_) return d_.dh_n ? at(d_.dh_n) + s_.state(b) * s_.P : nullptr;
    return has_direct_gradient() ? direct_ + b * s_.P : nullptr;
  }

  // Whether anything reads h of row b after this step. What nobody reads has no gradient, not one of zero: zero times
  // a NaN or an infinity in the row would be NaN.
  bool is_read(int64_t b) const { return b < continuing_rows_ || d_.dy || d_.dh_n; }

  void step(int64_t t) {
    begin_step(t);
    const int64_t row_end = least(row_end_, rows_);
    store_product(least(row_end, continuing_rows_), split_, recurrent_, d_.w_hh, gates(), s_.P,
                  [&](int64_t b) { return passed_on(next_, b); });
    each_row_vector(row_end, s_.P, [&](int64_t b, Units units) FUSED_RNN_INLINED { h_gradient(b, units); });
    if (s_.projected) {
      if (worker_.splits_units) worker_.wait();
      store_product(row_end, split_projection_, projection_, d_.w_hr, s_.P, s_.H,
                    [&](int64_t b) { return at(d_.dh_total) + (s_.row(t_) + b) * s_.P; });
      if (!s_.normalised) {
        each_row_vector(row_end, s_.H, [&](int64_t b, Units units) FUSED_RNN_INLINED {
          cell(load(product(b) + units.unit, units.count), b, units);
        });
      }
    }
    for (int64_t b = row_begin_; s_.normalised && b < row_end; ++b) normalised_cell(b);
    if (worker_.splits_units) worker_.wait();
  }

  // Every second step takes the blocks in the opposite order, to begin with the weights that are still in the cache.
  bool backwards() const { return t_ % 2 != 0; }

  // Of row b: what store_product() made; with layer normalisation, then the gradients of h or c' and of o.
  T* product(int64_t b) const { return product_ + b * product_width_; }

  // product = rows x W [K, N] for this worker's rows up to row_end and blocks of columns; row(b) points to row b.
  template <class Row>
  void store_product(int64_t row_end, const SplitRows& split, const T* panels, const void* W, int64_t K, int64_t N,
                     const Row& row) const {
    split_rows(split, row_end, row);
    const int64_t blocks = ceil_div(N, kBlock);
    const auto multiply_part = [&](const Part& part) {
      const T* rows[kMostRows];
      for (int r = 0; r < part.rows; ++r) rows[r] = row(part.row + r);
      Sums<T, U> sums;
      multiply_by(sums, part, rows, split, panels, W, K, N);
      each_vector<T, U>(part, N, [&](int slot, int u, Units units) {
        store(product(part.row_of(slot)) + units.unit, sums[slot][u], units.count);
      });
    };
    cover<U>(row_begin_, row_end, worker_.first(blocks), worker_.last(blocks), N % kBlock != 0, backwards(),
             multiply_part, splits_ ? 2 * split.height() : 0);
  }

  // Calls f(b, units) for each vector of this worker's rows up to row_end and share of n columns.
  template <class F>
  FUSED_RNN_INLINE void each_row_vector(int64_t row_end, int64_t n, const F& f) const {
    const int64_t blocks = ceil_div(n, kBlock), begin = worker_.first(blocks) * kBlock,
                  end = least(worker_.last(blocks) * kBlock, n);
    for (int64_t b = row_begin_; b < row_end; ++b) {
      each_lanes<T>(end - begin, [&](int64_t i, int64_t count) FUSED_RNN_INLINED { f(b, Units{begin + i, count}); });
    }
  }

  // The gradient of h after this step: the product of the next step's gate gradients and W_hh, plus the direct
  // gradient, plus dy. Passes it on to the projection, to normalised_cell() or to the cell.
  FUSED_RNN_INLINE void h_gradient(int64_t b, Units units) const {
    const int64_t unit = units.unit, n = units.count;
    Vec<T> dh{};
    if (b < continuing_rows_) dh = dropout_backward(load(product(b) + unit, n), b, units);
    if (const T* direct = direct_gradient(b)) dh += load(direct + unit, n);
    if (d_.dy) dh += load(at(d_.dy) + s_.place(s_.row(t_) + b) * d_.dy_stride + unit, n);
    if (s_.zones_h) dh = zoneout_backward(dh, b, units);
    if (s_.projected) {
      store(at(d_.dh_total) + (s_.row(t_) + b) * s_.P + unit, dh, n);
    } else if (s_.normalised) {
      store(product(b) + unit, dh, n);
    } else {
      cell(dh, b, units);
    }
  }

  FUSED_RNN_INLINE Vec<T> dropout_backward(const Vec<T>& dh, int64_t b, Units units) const {
    return s_.drops_h ? dh * load(at(d_.variant.drop_h) + s_.state(b) * s_.P + units.unit, units.count) : dh;
  }

  // Backward of zoneout: returns the gradient of the new h. The gradient of the old h is stored as the direct gradient
  // of the previous step, or added to that of the reset state if the old h came from a reset.
  FUSED_RNN_INLINE Vec<T> zoneout_backward(const Vec<T>& dh, int64_t b, Units units) const {
    const int64_t unit = units.unit, n = units.count, row = s_.row(t_) + b;
    const Vec<T> dh_new = dh * load(at(d_.variant.zones.h.at) + s_.place(row) * d_.variant.zones.h.stride + unit, n);
    Vec<T> dh_old = dh - dh_new;
    if (s_.reset(t_, b, reverse_)) {
      add_to(d_.dreset.h, t_ * d_.dreset.step_h + s_.state(b) * s_.P + unit, dh_old, n);
      dh_old = Vec<T>{};
    }
    store(direct_ + b * s_.P + unit, dh_old, n);
    return dh_new;
  }

  // Backward of the cell of row b, then of the layer normalisation of W_hh h.
  void normalised_cell(int64_t b) const {
    T* const dh = product(b);
    const int64_t row = s_.row(t_) + b;
    if constexpr (Cell::kHasC) {
      if (is_read(b)) {
        normalised_output(dh, row);
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

  // Backward of h = o * tanh(norm_c * LN(c') + norm_c_bias) for one row. dh is [2 * H]: on entry its first half is the
  // gradient of h; on return it is the gradient of c', and the second half is the gradient of o before its sigmoid.
  void normalised_output(T* dh, int64_t row) const {
    T *hat = at(d_.dnormal) + row * 2 * s_.H, *d_inner = hat + s_.H;
    const Reserve& kept = d_.reserve;
    const T *norm_c = at(d_.variant.norm_c), *norm_c_bias = at(d_.variant.norm_c_bias);
    const T *gates = at(kept.gates) + row * kept.stride, *c_prev = at(kept.c_prev) + row * kept.stride;
    each_lanes<T>(s_.H, [&](int64_t i, int64_t n) {
      Vec<T> saved[Cell::kSaved];
      for (int k = 0; k < Cell::kSaved; ++k) saved[k] = load(gates + k * s_.H + i, n);
      store(hat + i, Cell::next_c(saved, load(c_prev + i, n)), n);
    });
    const T rstd = normalise(hat, s_.H);
    each_lanes<T>(s_.H, [&](int64_t i, int64_t n) {
      const Vec<T> inner = load(norm_c + i, n) * load(hat + i, n) + load(norm_c_bias + i, n);
      Vec<T> grad_o;
      store(d_inner + i,
            Cell::output_backward(load(gates + Cell::kOutputGate * s_.H + i, n), inner, load(dh + i, n), grad_o), n);
      store(dh + s_.H + i, grad_o, n);
    });
    normalise_backward(dh, d_inner, norm_c, hat, rstd, s_.H);
    each_lanes<T>(s_.H, [&](int64_t i, int64_t n) { store(hat + i, load(hat + i, n) * load(d_inner + i, n), n); });
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
      if (d_.variant.zones.c.at) {
        const V zone = load(at(d_.variant.zones.c.at) + s_.place(row) * d_.variant.zones.c.stride + unit, n);
        dc_old = dc - dc * zone;
        dc = dc * zone;
      }
    }
    if (Cell::kHasC && (s_.normalised || !is_read(b))) {
      if constexpr (Cell::kHasC) {
        if (s_.normalised) dc += dh;  // the gradient of c' here; see normalised_output()
        Cell::gates_backward(saved, c_prev, dc, grads);
        grads[Cell::kOutputGate] = s_.normalised ? load(product(b) + s_.H + unit, n) : V{};
      }
    } else {
      Cell::backward(saved, h_prev, c_prev, dh, dc, grads, dh_prev);
    }
    dc += dc_old;
    T* out = dgates(row) + unit;
    for (int i = 0; i < Cell::kGrads; ++i) store(out + i * s_.H, grads[i], n);
    if (s_.reset(t_, b, reverse_)) {  // this step read the reset states, so they receive its gradients
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

  // The first step, in the order of the direction, that row b takes part in.
  int64_t first_step(int64_t b) const {
    int64_t t = reverse_ ? s_.T - 1 : 0;
    while (b >= s_.rows(t)) --t;  // never at t = 0, where every row is active
    return t;
  }

  // dh0, from the gradients of each row's first step.
  void initial_gradients() {
    store_product(row_end_, split_, recurrent_, d_.w_hh, gates(), s_.P,
                  [&](int64_t b) { return passed_on(first_step(b), b); });
    each_row_vector(row_end_, s_.P, [&](int64_t b, Units units) {
      Vec<T> sum = dropout_backward(load(product(b) + units.unit, units.count), b, units);
      if (has_direct_gradient()) sum += load(direct_ + b * s_.P + units.unit, units.count);
      store(at(d_.dh0) + s_.state(b) * s_.P + units.unit, sum, units.count);
    });
    if (splits_ && worker_.splits_units) worker_.wait();  // before the rows are split for another product
  }

  // Adds the part of the reset states' gradients that passes through W_hh; cell() and zoneout_backward() add the rest.
  void reset_gradients() {
    for (t_ = 0; t_ < s_.T; ++t_) {
      const int64_t row_end = least(row_end_, s_.rows(t_));
      bool any = false;
      for (int64_t b = row_begin_; b < row_end; ++b) any = any || s_.reset(t_, b, reverse_);
      if (!any) continue;
      store_product(row_end, split_, recurrent_, d_.w_hh, gates(), s_.P,
                    [&](int64_t b) { return s_.reset(t_, b, reverse_) ? dproduct(t_, b) : zeros_; });
      each_row_vector(row_end, s_.P, [&](int64_t b, Units units) {
        const Vec<T> sum = dropout_backward(load(product(b) + units.unit, units.count), b, units);
        add_to(d_.dreset.h, t_ * d_.dreset.step_h + s_.state(b) * s_.P + units.unit, sum, units.count);
      });
      if (splits_ && worker_.splits_units) worker_.wait();
    }
  }

  const LayerShape& s_;
  const BackwardDirection& d_;
  const bool packed_, splits_, accumulate_, reverse_;
  const cpu::Worker& worker_;
  const int64_t row_begin_, row_end_;
  const TileProducts tile_products_;
  SplitRows split_, split_projection_;  // if splits_
  T *recurrent_, *projection_, *direct_, *product_, *zeros_;
  int64_t product_width_, t_ = 0, next_ = 0, rows_ = 0, continuing_rows_ = 0;
};

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
