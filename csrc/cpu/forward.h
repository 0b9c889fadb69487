// Forward of one layer in one direction, computed by a team of threads. The threads split either the batch rows or the
// hidden units; the loop over time steps is sequential.
//
// A step multiplies x and the previous h by the packed weights and runs the cell on the sums, which begin with the
// biases, while they are in the first-level cache. The new h is stored in y, where the next step reads it.
// Small batches multiply x of all steps before the first step, so that each load of W_ih serves more rows.
// Packing is skipped where the weights serve too few rows: fewer than rows_worth_transposing() over all steps, and for
// W_hh one row per step where vectors are short. Packed and unpacked products round differently, so `deterministic`
// layers, whose rows must not depend on the batch around them, always pack. A worker packs a block that no other one
// needs just before it first multiplies by it, in a single step always to the same place, and the others before the
// first step. Packed products of float32 may be computed on tiles (LayerShape::operands): the rows that a step
// multiplies are then split before its products, as they are rounded for int8 weights. Weights of bfloat16 are widened
// as they are read, or packed.
//
// With a projection, the cell's output is stored in `hidden` and a second product gives h. With layer normalisation,
// the products of a step are stored first, because a row's mean needs all of its units; the cell then runs row by row.
#pragma once

#include "../cells/cells.h"
#include "forward_workspace.h"
#include "frozen.h"
#include "layer_norm.h"
#include "pack.h"
#include "worker.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// Weights: Float32 for weights of T, as they are or packed; else the format of frozen weights.
template <class Cell, class T, class Weights = Float32>
class Forward {
 public:
  Forward(const LayerShape& shape, const ForwardDirection& direction, bool reverse, const cpu::Worker& worker)
      : s_(shape),
        d_(direction),
        products_(shape),
        reverse_(reverse),
        worker_(worker),
        row_begin_(worker.splits_units ? 0 : worker.begin(shape.B)),
        row_end_(worker.splits_units ? shape.B : worker.end(shape.B)),
        tile_products_(shape.unit) {
    T* workspace = static_cast<T*>(d_.workspace);
    const ForwardWorkspace<Cell, T> part(shape);
    if constexpr (kSplits) split_ = {s_, products_, part, workspace, worker_};
    recurrent_ = workspace + part.recurrent;
    input_ = workspace + part.input;
    bias_ = workspace + part.bias;
    projection_ = workspace + part.projection;
    if (s_.frozen()) {
      recurrent_ = packed(d_.w_hh);
      input_ = packed(d_.w_ih);
      bias_ = packed(d_.b_ih);
      projection_ = packed(d_.w_hr);
    }
    scratch_hidden_ = workspace + part.hidden;
    zeros_ = workspace + part.zeros;
    dropped_ = workspace + part.dropped;
    scratch_products_ = workspace + part.products;
    outputs_ = workspace + part.outputs;
    x_product_ = s_.train ? at(d_.reserve.gates) : workspace + part.x_product;
    x_product_stride_ = s_.train ? d_.reserve.stride : Cell::kGates * s_.H;
    x_gates_ = s_.gates_given ? at(d_.x) : x_product_;
    x_gates_stride_ = s_.gates_given ? s_.directions * Cell::kGates * s_.H : x_product_stride_;
  }

  void operator()() {
    for (int64_t i = 0; worker_.index == 0 && i < s_.P; ++i) zeros_[i] = 0;
    if (!s_.frozen()) pack_biases();
    if (products_.packed_x && !worker_.owns_blocks()) pack<G>(input_, d_.w_ih, s_.H, s_.I);
    if (products_.x_beforehand && !s_.gates_given) {
      if (!worker_.owns_blocks()) worker_.wait();
      multiply_x();
      if (!worker_.owns_blocks()) worker_.wait();
    }
    if (products_.packed_h && !worker_.owns_blocks()) {
      pack<G>(recurrent_, d_.w_hh, s_.H, s_.P);
      if (s_.projected) pack<1>(projection_, d_.w_hr, s_.P, s_.H);
    }
    worker_.wait();
    for (int64_t i = 0; i < s_.T; ++i) step(reverse_ ? s_.T - 1 - i : i);
    if (d_.h_n) store_h_n();
  }

 private:
  static constexpr int G = Cell::kGates, U = kUnitVectors<G>, C = G * U;
  static constexpr int64_t kBlock = U * kLanes<T>;  // units of a block of gates
  static constexpr int UP = kUnitVectors<1>;        // vectors of a block of the projection, which has one "gate"
  static constexpr int64_t kProjectionBlock = UP * kLanes<T>;
  // Whether the cell only adds both products: then their gradients are the same. Their sum is in from_x, without b_hh.
  static constexpr bool kAddsProducts = Cell::kGrads == G;
  static constexpr bool kSplits = sizeof(T) == sizeof(float);  // for tiles, if LayerShape::operands says so

  static T* at(void* p) { return static_cast<T*>(p); }
  static const T* at(const void* p) { return static_cast<const T*>(p); }
  static T* packed(const void* p) { return static_cast<T*>(const_cast<void*>(p)); }  // nothing packs there again

  // Calls f with weights as what they are.
  template <class F>
  void with_type(const void* weights, const F& f) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (s_.bf16_weights) return f(static_cast<const Bf16*>(weights));
    }
    f(at(weights));
  }

  bool narrow_end() const { return U > 1 && s_.H % kBlock != 0; }

  // Whether a block is multiplied by one step alone, right after this worker has packed it: then all panels take the
  // place of the worker's first, which stays in the cache.
  bool packs_in_place() const { return s_.T == 1 && worker_.owns_blocks() && !s_.frozen(); }

  // The panel of a block of W [Gates * H, K].
  template <int Gates>
  T* panel_at(T* panels, int64_t block, int64_t K) const {
    constexpr int64_t kColumns = Gates * kUnitVectors<Gates> * kLanes<T>;
    return panels + block * (s_.on_tiles() ? SplitPanel::size(K, kColumns, s_.operands) : K * kColumns);
  }
  // Where a part's panels begin.
  template <int Gates>
  T* panels_of(const Part& part, T* panels, int64_t H, int64_t K) const {
    const int64_t blocks = ceil_div(H, kUnitVectors<Gates> * kLanes<T>);
    return panel_at<Gates>(panels, packs_in_place() ? worker_.first(blocks) : part.block, K);
  }

  // Packs this worker's share of the blocks of W [Gates * H, K].
  template <int Gates>
  void pack(T* panels, const void* W, int64_t H, int64_t K) const {
    constexpr int64_t kUnits = kUnitVectors<Gates> * kLanes<T>;
    const int64_t blocks = ceil_div(H, kUnits);
    const int64_t begin = worker_.begin(blocks);
    pack_blocks<Gates>(panel_at<Gates>(panels, begin, K), W, H, K, begin, worker_.end(blocks));
  }

  // Packs the blocks [block, end) into panels from `to` on.
  template <int Gates>
  void pack_blocks(T* to, const void* W, int64_t H, int64_t K, int64_t block, int64_t end) const {
    constexpr int64_t kUnits = kUnitVectors<Gates> * kLanes<T>;
    for (; block < end && !s_.frozen(); ++block, to = panel_at<Gates>(to, 1, K)) {
      if constexpr (kSplits) {
        if (s_.on_tiles()) {
          split_panel<Gates>(to, block, H, K).template pack_rows<Gates>(W, s_.bf16_weights, H, K, block * kUnits);
          continue;
        }
      }
      with_type(W, [&](auto* weights) { pack_rows<T, Gates>(to, weights, H, K, block * kUnits); });
    }
  }

  template <int Gates>
  SplitPanel split_panel(T* panel, int64_t block, int64_t H, int64_t K) const {
    const int vectors = block_vectors<T, Gates>(H, block * kUnitVectors<Gates> * kLanes<T>);
    return {panel, K, vectors * int(kLanes<T>), s_.operands};
  }

  void pack_biases() const {
    const int64_t blocks = ceil_div(s_.H, kBlock);
    for (int64_t b = worker_.begin(blocks); b < worker_.end(blocks); ++b) {
      pack_bias<T, G>(bias_ + b * 2 * C * kLanes<T>, at(d_.b_ih), s_.H, b * kBlock);
      pack_bias<T, G>(bias_ + (b * 2 + 1) * C * kLanes<T>, at(d_.b_hh), s_.H, b * kBlock);
    }
  }

  // Rows of a part for cover(): two tiles.
  int tiles(const typename Weights::Rows& split) const { return s_.on_tiles() ? 2 * split.height() : 0; }

  bool splits() const { return Weights::kRoundsRows || s_.on_tiles(); }
  // Splits, or rounds, the rows up to `end` of a product's operand, if it needs that; row(b) points to row b. If the
  // team shares the work, a wait must follow.
  template <class Row>
  void split(bool is_packed, const typename Weights::Rows& rows, int64_t end, const Row& row) const {
    if constexpr (kSplits) {
      if (splits() && is_packed) rows.split(end, worker_, worker_.splits_units, row);
    }
  }
  void wait_for_splits() const {
    if (splits() && worker_.splits_units) worker_.wait();
  }

  // sums = start + rows x W^T for a part; reads W from `packed` if is_packed, else from W itself. `split` has the rows'
  // tiles, `next` is the panel that is read after this one; null: none.
  template <int Gates>
  void multiply_by(Sums<T, Gates * kUnitVectors<Gates>>& sums, const Start<T>& start, const Part& part,
                   const T* const* rows, const typename Weights::Rows& split, bool is_packed, T* packed, const void* W,
                   int64_t H, int64_t K, const T* next = nullptr) const {
    constexpr int64_t kVectors = kUnitVectors<Gates>, kColumns = Gates * kVectors;
    T* const panels = panels_of<Gates>(part, packed, H, K);
    if (Weights::kNarrow || s_.on_tiles() || !is_packed) begin_with<kColumns>(sums, start, part.slots());
    if constexpr (Weights::kNarrow) {
      return Weights::template multiply<Gates>(sums, part, rows, split, reinterpret_cast<const char*>(packed), K);
    }
    if (is_packed && first_use_ && worker_.owns_blocks() && part.row == row_begin_) {
      pack_blocks<Gates>(panels, W, H, K, part.block, part.block + part.blocks);
    }
    if (is_packed && s_.on_tiles()) {
      if constexpr (kSplits && !Weights::kNarrow) {
        const int64_t unit = part.block * kVectors * kLanes<T>;
        tile_products_.add(sums, block_vectors<T, Gates>(H, unit), split, part.row, part.rows,
                           split_panel<Gates>(panels, part.block, H, K),
                           [&](int r) { add_rows_in_float32<Gates>(sums[r], rows[r], at(W), H, K, unit); });
      }
    } else if (is_packed) {
      const int64_t distance = K * kColumns * kLanes<T>;
      const int vectors = block_vectors<T, Gates>(H, part.block * kVectors * kLanes<T>);
      const Panel<T> panel{panels, vectors * kLanes<T>, distance, vectors, part.row == row_begin_ ? next : nullptr};
      multiply<T, kColumns>(sums, start, part, rows, panel, K);
    } else {
      for (int i = 0; i < part.blocks; ++i) {
        const int64_t unit = part.block_of(i) * kVectors * kLanes<T>;
        with_type(W,
                  [&](auto* weights) { multiply_unpacked<T, Gates>(sums + i, rows, part.rows, weights, H, K, unit); });
      }
    }
  }

  template <int kColumns>
  static void begin_with(Sums<T, kColumns>& sums, const Start<T>& start, int slots) {
    for (int slot = 0; start.data && slot < slots; ++slot) {
      for (int c = 0; c < kColumns; ++c) sums[slot][c] = load(start.data + slot * start.distance + c * kLanes<T>);
    }
  }

  // b_ih (which = 0) or b_hh (which = 1) of a part's blocks.
  Start<T> biases(const Part& part, int which) const {
    return {bias_ + (part.block * 2 + which) * C * kLanes<T>, part.blocks == 1 ? 0 : 2 * C * kLanes<T>};
  }

  void multiply_x() {
    const auto multiply_part = [&](const Part& part) {
      const T* rows[kMostRows];
      for (int r = 0; r < part.rows; ++r) rows[r] = at(d_.x) + s_.place(part.row + r) * s_.I;
      Sums<T, C> sums;
      multiply_by<G>(sums, biases(part, 0), part, rows, split_.x, products_.packed_x, input_, d_.w_ih, s_.H, s_.I);
      each_vector<T, U>(part, s_.H, [&](int slot, int u, Units units) {
        T* out = x_product_ + part.row_of(slot) * x_product_stride_ + units.unit;
        for (int g = 0; g < G; ++g) store(out + g * s_.H, sums[slot][g * U + u], units.count);
      });
    };
    const int64_t blocks = ceil_div(s_.H, kBlock);
    const bool all = worker_.owns_blocks();
    split(products_.packed_x, split_.x, all ? s_.N : worker_.end(s_.N),
          [&](int64_t n) { return at(d_.x) + s_.place(n) * s_.I; });
    wait_for_splits();
    cover<C>(all ? 0 : worker_.begin(s_.N), all ? s_.N : worker_.end(s_.N), worker_.first(blocks), worker_.last(blocks),
             narrow_end(), false, multiply_part, products_.packed_x ? tiles(split_.x) : 0);
  }

  // Sets the current step. Its rows below started_rows_ took part in the previous step, in the order of the direction,
  // whose first row in y is previous_row_; the others start here, from h0.
  void begin_step(int64_t t) {
    t_ = t;
    rows_ = s_.rows(t);
    if (reverse_) {
      started_rows_ = t == s_.T - 1 ? 0 : s_.rows(t + 1);
      previous_row_ = started_rows_ ? s_.row(t + 1) : 0;
    } else {
      started_rows_ = t == 0 ? 0 : rows_;
      previous_row_ = started_rows_ ? s_.row(t - 1) : 0;
    }
  }

  const T* h_prev(int64_t b) const {
    const int64_t state = s_.state(b) * s_.P;
    if (s_.reset(t_, b, reverse_)) return d_.reset.h ? at(d_.reset.h) + t_ * d_.reset.step_h + state : zeros_;
    if (b < started_rows_) return y(previous_row_ + b);
    return d_.h0 ? at(d_.h0) + state : zeros_;
  }

  // The operand of W_ih.
  const T* x_row(int64_t b) const { return at(d_.x) + s_.place(s_.row(t_) + b) * s_.I; }
  // The operand of W_hh: h, times the dropout mask if there is one.
  const T* recurrent_input(int64_t b) const { return s_.drops_h ? dropped(b) : h_prev(b); }
  T* dropped(int64_t b) const {
    return s_.train ? at(d_.reserve.h_prev) + (s_.row(t_) + b) * d_.reserve.stride : dropped_ + b * s_.P;
  }
  T* y(int64_t row) const { return at(d_.y) + s_.place(row) * d_.y_stride; }

  T* hidden(int64_t b) const {
    return d_.reserve.hidden ? at(d_.reserve.hidden) + (s_.row(t_) + b) * d_.reserve.stride
                             : scratch_hidden_ + b * s_.H;
  }

  void step(int64_t t) {
    begin_step(t);
    const int64_t row_end = least(row_end_, rows_);
    const int64_t blocks = ceil_div(s_.H, kBlock);
    if (s_.drops_h) drop(row_end);
    split(products_.packed_x && !products_.x_beforehand, split_.x, row_end, [&](int64_t b) { return x_row(b); });
    split(products_.packed_h, split_.h, row_end, [&](int64_t b) { return recurrent_input(b); });
    wait_for_splits();
    cover<C>(
        row_begin_, row_end, worker_.first(blocks), worker_.last(blocks), narrow_end(), backwards(),
        [&](const Part& part) { gates(part); }, tiles(split_.h));
    for (int64_t b = row_begin_; s_.normalised && b < row_end; ++b) normalised_cell(b);
    if (s_.train && !s_.drops_h && !(s_.chains_h(Cell::kSavesH) && started_rows_ > 0)) keep_h_prev(row_end);
    if (s_.projected) {
      if (worker_.splits_units) worker_.wait();
      split(products_.packed_h, split_.hidden, row_end, [&](int64_t b) { return hidden(b); });
      wait_for_splits();
      const int64_t outputs = ceil_div(s_.P, kProjectionBlock);
      cover<UP>(
          row_begin_, row_end, worker_.first(outputs), worker_.last(outputs), s_.P % kProjectionBlock != 0, backwards(),
          [&](const Part& part) { project(part); }, tiles(split_.hidden));
    }
    if (row_end > row_begin_) first_use_ = false;
    if (worker_.splits_units) worker_.wait();
  }

  // Every second step takes the blocks in the opposite order, to begin with the weights that are still in the cache.
  bool backwards() const { return t_ % 2 != 0; }

  // The panels that a step reads after a block's panel of W_ih, and after that of W_hh; null: none, or not packed yet.
  const T* after_input(int64_t block) const {
    return products_.packed_h && !packs_in_place() ? panel_at<G>(recurrent_, block, s_.P) : nullptr;
  }
  const T* after_recurrent(int64_t block) const {
    const int64_t blocks = ceil_div(s_.H, kBlock), next = block + (backwards() ? -1 : 1);
    if (packs_in_place() || next < worker_.first(blocks) || next >= worker_.last(blocks)) return nullptr;
    if (products_.x_beforehand) return after_input(next);
    return products_.packed_x ? panel_at<G>(input_, next, s_.I) : nullptr;
  }

  void drop(int64_t row_end) const {
    for (int64_t b = row_begin_; b < row_end; ++b) {
      const T *h = h_prev(b), *factor = at(d_.variant.drop_h) + s_.state(b) * s_.P;
      T* out = dropped(b);
      each_lanes<T>(s_.P, [&](int64_t i, int64_t n) { store(out + i, load(h + i, n) * load(factor + i, n), n); });
      if (d_.reserve.h_direct) {
        __builtin_memcpy(at(d_.reserve.h_direct) + (s_.row(t_) + b) * d_.reserve.stride, h, s_.P * sizeof(T));
      }
    }
  }

  void keep_h_prev(int64_t row_end) {
    const int64_t from = worker_.first(s_.P), count = worker_.last(s_.P) - from;
    for (int64_t b = row_begin_; b < row_end; ++b) {
      T* out = at(d_.reserve.h_prev) + (s_.row(t_) + b) * d_.reserve.stride + from;
      __builtin_memcpy(out, h_prev(b) + from, count * sizeof(T));
    }
  }

  // Copies h after each row's last step to h_n.
  void store_h_n() {
    const int64_t from = worker_.first(s_.P), count = worker_.last(s_.P) - from;
    int64_t t = reverse_ ? 0 : s_.T - 1;
    for (int64_t b = row_begin_; b < row_end_; ++b) {
      while (b >= s_.rows(t)) --t;
      __builtin_memcpy(at(d_.h_n) + s_.state(b) * s_.P + from, y(s_.row(t) + b) + from, count * sizeof(T));
      if (!reverse_) t = s_.T - 1;
    }
  }

  // Computes the products of a part at this step and runs the cell on them.
  void gates(const Part& part) const {
    Sums<T, C> from_x, from_h;
    const T *x[kMostRows], *h[kMostRows];
    for (int r = 0; r < part.rows; ++r) {
      x[r] = x_row(part.row + r);
      h[r] = recurrent_input(part.row + r);
    }
    if (!products_.x_beforehand) {
      multiply_by<G>(from_x, biases(part, 0), part, x, split_.x, products_.packed_x, input_, d_.w_ih, s_.H, s_.I,
                     after_input(part.block));
    } else if (!s_.normalised) {
      load_x_gates(from_x, part);
    }
    if (s_.train) fetch_reserve(part);
    const auto multiply_h = [&](Sums<T, C>& sums, const Start<T>& start, const Part& rows) {
      multiply_by<G>(sums, start, rows, h, split_.h, products_.packed_h, recurrent_, d_.w_hh, s_.H, s_.P,
                     after_recurrent(part.block));
    };
    const bool together = kAddsProducts && !s_.normalised;
    const Start<T> apart = kAddsProducts || s_.normalised ? kFromZero<T> : biases(part, 1);
    if (started_rows_ > 0 || d_.h0 || d_.reset.h) {
      together ? multiply_h(from_x, {}, part) : multiply_h(from_h, apart, part);
    } else {
      // h is zero in all rows: one row is multiplied, and its sums go to the others, too. The product is not skipped,
      // because it is NaN where W_hh has a NaN or an infinity.
      Part one = part;
      one.rows = 1;
      multiply_h(from_h, apart, one);
      for (int slot = 0; slot < part.slots(); ++slot) {
        const Vec<T>* of_block = from_h[part.blocks == 1 ? 0 : slot];
        for (int c = 0; c < C; ++c) together ? from_x[slot][c] += of_block[c] : from_h[slot][c] = of_block[c];
      }
    }
    if (s_.normalised) {
      return each_vector<T, U>(part, s_.H, [&](int slot, int u, Units units) {
        T* out = product(part.row_of(slot)) + units.unit;
        for (int g = 0; g < G; ++g) store(out + g * s_.H, from_h[slot][g * U + u], units.count);
      });
    }
    each_vector<T, U>(part, s_.H, [&](int slot, int u, Units units) FUSED_RNN_INLINED {
      const int64_t b = part.row_of(slot);
      const T* const b_hh = biases(part, 1).from(slot).data;
      Vec<T> input[G], recurrent[G];
      for (int g = 0; g < G; ++g) {
        const int c = g * U + u;
        input[g] = from_x[slot][c];
        recurrent[g] = kAddsProducts ? load(b_hh + c * kLanes<T>) : from_h[slot][c];
      }
      Vec<T> inner[2];
      cell(input, recurrent, s_.drops_h ? h_prev(b) : h[b - part.row], b, units, inner);
      if constexpr (Cell::kHasC) from_h[slot][u] = inner[0], from_h[slot][U + u] = inner[1];
    });
    if constexpr (Cell::kHasC) {
      each_vector<T, U>(part, s_.H, [&](int slot, int u, Units units) FUSED_RNN_INLINED {
        const int64_t b = part.row_of(slot);
        store_output(Cell::output(from_h[slot][U + u], from_h[slot][u]), s_.zones_h ? h_prev(b) : nullptr, b, units);
      });
    }
  }

  // Fetches, while a part is multiplied, where its cells will keep values for backward.
  void fetch_reserve(const Part& part) const {
    for (int slot = 0; slot < part.slots(); ++slot) {
      const int64_t unit = part.block_of(slot) * kBlock, count = least(s_.H - unit, kBlock);
      const int64_t at_unit = (s_.row(t_) + part.row_of(slot)) * d_.reserve.stride + unit;
      for (int i = 0; i < Cell::kSaved; ++i) fetch<true>(at(d_.reserve.gates) + at_unit + i * s_.H, count);
      if constexpr (Cell::kHasC) fetch<true>(at(d_.reserve.c_prev) + at_unit, count);
    }
  }

  // sums = W_ih x + b_ih of a part at this step; only with x_beforehand.
  void load_x_gates(Sums<T, C>& sums, const Part& part) const {
    const Start<T> b_ih = biases(part, 0);
    each_vector<T, U>(part, s_.H, [&](int slot, int u, Units units) {
      const T* from = x_gates_row(part.row_of(slot)) + units.unit;
      for (int g = 0; g < G; ++g) {
        const int c = g * U + u;
        sums[slot][c] = load(from + g * s_.H, units.count);
        if (s_.gates_given) sums[slot][c] += load(b_ih.from(slot).data + c * kLanes<T>);
      }
    });
  }

  // W_ih x of row b at this step; only with x_beforehand.
  const T* x_gates_row(int64_t b) const {
    const int64_t row = s_.row(t_) + b;
    return x_gates_ + (s_.gates_given ? s_.place(row) : row) * x_gates_stride_;
  }

  // Where W_hh h of row b at this step is stored and normalised.
  T* product(int64_t b) const {
    return s_.train ? at(d_.reserve.h_hat) + (s_.row(t_) + b) * d_.reserve.stride : scratch_products_ + b * G * s_.H;
  }

  // Layer normalisation of W_hh h of row b, then the cell.
  void normalised_cell(int64_t b) const {
    T* hat = product(b);
    const T rstd = normalise(hat, G * s_.H);
    if (s_.train) hat[G * s_.H] = rstd;
    const T *x_gates = x_gates_row(b), *gain = at(d_.variant.norm_hh);
    T *c = outputs_ + b * 2 * s_.H, *o = c + s_.H;
    const Part row{b, 0, 1, int(ceil_div(s_.H, kBlock))};
    each_vector<T, U>(row, s_.H, [&](int slot, int u, Units units) {
      const T* bias = bias_ + slot * 2 * C * kLanes<T> + u * kLanes<T>;
      Vec<T> input[G], recurrent[G];
      for (int g = 0; g < G; ++g) {
        const int64_t at_gate = g * s_.H + units.unit, n = units.count;
        input[g] = load(bias + g * U * kLanes<T>) + load(x_gates + at_gate, n);
        recurrent[g] = load(bias + (C + g * U) * kLanes<T>) + load(gain + at_gate, n) * load(hat + at_gate, n);
      }
      Vec<T> inner[2];
      cell(input, recurrent, h_prev(b), b, units, inner);
      if constexpr (Cell::kHasC)
        store(c + units.unit, inner[0], units.count), store(o + units.unit, inner[1], units.count);
    });
    if constexpr (Cell::kHasC) {
      const T *norm_c = at(d_.variant.norm_c), *norm_c_bias = at(d_.variant.norm_c_bias);
      normalise(c, s_.H);
      each_lanes<T>(s_.H, [&](int64_t i, int64_t n) {
        const Vec<T> inner = load(norm_c + i, n) * load(c + i, n) + load(norm_c_bias + i, n);
        store_output(Cell::output(load(o + i, n), inner), h_prev(b), b, {i, n});
      });
    }
  }

  // Stores the cell's output of row b: in `hidden` for the projection, or in y.
  FUSED_RNN_INLINE void store_output(const Vec<T>& h, const T* h_prev, int64_t b, Units units) const {
    if (!s_.projected) return store_y(h, h_prev, b, units);
    store(hidden(b) + units.unit, h, units.count);
  }

  // Stores the new h of row b, after zoneout, in y.
  FUSED_RNN_INLINE void store_y(const Vec<T>& h, const T* h_prev, int64_t b, Units units) const {
    const int64_t unit = units.unit, n = units.count, row = s_.row(t_) + b;
    T* out = y(row) + unit;
    if (!s_.zones_h) return store(out, h, n);
    const T* zone = at(d_.variant.zones.h.at) + s_.place(row) * d_.variant.zones.h.stride;
    store(out, math::between(load(h_prev + unit, n), h, load(zone + unit, n)), n);
  }

  // The cell for some units of row b at this step. input: W_ih x + b_ih, recurrent: W_hh h + b_hh, of each gate; or, if
  // the cell only adds the two, any other terms of the sum.
  // Of a cell with c, the output is left to the caller, who gets c' and o in `inner`: it waits for all gates, and the
  // processor has better things to do meanwhile.
  FUSED_RNN_INLINE void cell(const Vec<T> (&input)[G], const Vec<T> (&recurrent)[G], const T* h_prev, int64_t b,
                             Units units, Vec<T> (&inner)[2]) const {
    const int64_t unit = units.unit, n = units.count;
    const Reserve& keep = d_.reserve;
    const int64_t row = s_.row(t_) + b, state = s_.state(b) * s_.H + unit;
    Vec<T> saved[Cell::kSaved], h, h_in{}, c{};
    if constexpr (Cell::kUsesH) h_in = load(h_prev + unit, n);
    if constexpr (Cell::kHasC) {
      if (!s_.reset(t_, b, reverse_)) {
        c = load(at(d_.c) + state, n);
      } else if (d_.reset.c) {
        c = load(at(d_.reset.c) + t_ * d_.reset.step_c + state, n);
      }
      if (s_.train) store(at(keep.c_prev) + row * keep.stride + unit, c, n);
    }
    const Vec<T> c_in = c;
    Cell::forward(input, recurrent, h_in, c, saved, h);
    if constexpr (Cell::kHasC) {
      inner[0] = c, inner[1] = saved[Cell::kOutputGate];
      if (d_.variant.zones.c.at) {
        const T* zone = at(d_.variant.zones.c.at) + s_.place(row) * d_.variant.zones.c.stride;
        c = math::between(c_in, c, load(zone + unit, n));
      }
      store(at(d_.c) + state, c, n);
      if (d_.c_sequence) store(at(d_.c_sequence) + s_.place(row) * s_.directions * s_.H + unit, c, n);
    }
    if (s_.train) {
      T* gates = at(keep.gates) + row * keep.stride + unit;
      for (int i = 0; i < Cell::kSaved; ++i) store(gates + i * s_.H, saved[i], n);
    }
    if constexpr (!Cell::kHasC) store_output(h, h_prev, b, units);
  }

  void project(const Part& part) const {
    const T* rows[kMostRows];
    for (int r = 0; r < part.rows; ++r) rows[r] = hidden(part.row + r);
    Sums<T, UP> sums;
    multiply_by<1>(sums, kFromZero<T>, part, rows, split_.hidden, products_.packed_h, projection_, d_.w_hr, s_.P, s_.H);
    each_vector<T, UP>(part, s_.P, [&](int slot, int u, Units units) {
      const int64_t b = part.row_of(slot);
      store_y(sums[slot][u], s_.zones_h ? h_prev(b) : nullptr, b, units);
    });
  }

  const LayerShape& s_;
  const ForwardDirection& d_;
  const ForwardProducts products_;
  const bool reverse_;
  const cpu::Worker& worker_;
  const int64_t row_begin_, row_end_;
  const TileProducts tile_products_;
  SplitOperands<typename Weights::Rows> split_;  // if splits()
  T *recurrent_, *input_, *bias_, *projection_, *scratch_hidden_, *zeros_, *x_product_;
  T *dropped_, *scratch_products_, *outputs_;
  const T* x_gates_;  // [N, G*H] W_ih x where x_beforehand: x_product_, or the given x
  int64_t x_product_stride_, x_gates_stride_;
  bool first_use_ = true;                                           // of the weights, in this step
  int64_t t_ = 0, rows_ = 0, started_rows_ = 0, previous_row_ = 0;  // of the current step; see begin_step()
};

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
