// Backward of a layer's recurrence, all time steps in one launch: the gradients of the gates before their activations.
//
// Parallel over directions, teams (batch rows) and parts (units), as forward is. A block keeps the rows of W_hh^T of
// its units. At every step it multiplies them by the gate gradients that all parts published at the next step (in
// forward's order), which gives the gradients of its units' h; it runs the cell's backward and publishes the gate
// gradients of its units. The caller multiplies the published dgates into the gradients of weights and input. After the
// last step, one more product gives dh0. With kSplitColumns the blocks of a cluster split the product's columns and
// exchange the sums (reduction.cuh).
#pragma once

#include "../cells/cells.h"
#include "exchange.cuh"
#include "product.cuh"
#include "reduction.cuh"
#include "regularised.cuh"
#include "row_options.cuh"

namespace fused_rnn {
namespace cuda {

template <class Cell, class E, class Shape>
FUSED_RNN_KERNEL(Shape::kThreads)
backward(const BackwardParams params) {
  using Weights = ResidentProduct<E, Shape::kShares, Shape>;
  if constexpr (!can_run(Shape::kExchange)) {
    trap();
    return;
  }
  const Sequence& q = params.sequence;
  const Block<Shape> block(q);
  const BackwardDirection& d = params.direction[block.direction()];
  const int H = q.H, Hp = padded<E>(H), unit = block.unit(), columns = Cell::kGates * Hp;
  const bool is_unit = unit < H;
  const Product share = backward_product(Shape::kExchange, columns, sizeof(typename E::Stored));
  const int first_column = block.rank() * share.columns, rest = columns - first_column;
  const int own_columns = rest < share.columns ? (rest < 0 ? 0 : rest) : share.columns;
  const Layout layout(Shape::instance(), share, q.division.tiles);
  const auto sums = shared_memory<typename Weights::Sums>(layout.sums);
  const auto states = shared_memory<float>(layout.state);
  typename ExchangeFor<E, Shape>::Type exchange(
      Rows<E>{static_cast<typename E::Stored*>(d.dgates), q.B, Cell::kGrads * Hp,
              Cell::kHiddenGrads * Hp + first_column, own_columns},
      block, layout, block.time(0, true));
  typename SumsFor<Weights, Shape>::Type reduction(block, layout);
  Weights weights(static_cast<const typename E::Stored*>(d.w_hh_t) + first_column, H, columns, own_columns,
                  block.first_unit() - block.rank() * Shape::kUnits, shared_memory<Words>(layout.weights));

  constexpr bool kEarlyOptions = Shape::kRowsPerThread == 1;  // as in forward

  // State 0 is the gradient of h without the product, state 1 the gradient of c.
  for (int j = 0; j < q.division.tiles; ++j) {
    const Tile tile = block.tile(j);
    const State<Shape> state(states, block, tile);
    for (int i = 0; i < Shape::kRowsPerThread; ++i) {
      const int row = block.row(i);
      if (row >= Shape::kRows) break;
      const bool present = is_unit && row < tile.rows;
      const int64_t at = (tile.first + row) * H + unit;
      state.store(0, i, present ? value_or_zero<E>(d.dh_n, at) : 0.0f);
      state.store(1, i, present ? value_or_zero<E>(d.dc_n, at) : 0.0f);
    }
  }
  sync_block();

  for (int64_t step = 0; step <= q.T; ++step) {  // the last iteration computes only the product of dh0
    const int64_t t = step < q.T ? block.time(step, true) : -1;
    for (int j = 0; j < q.division.tiles; ++j) {
      const Tile tile = block.tile(j);
      // Loaded before the product, which hides the latency. Nothing waits for a value before the product is done;
      // therefore even rows that have ended are loaded, and their values not used.
      Early<E> saved_bits[Shape::kRowsPerThread][Cell::kSaved], h_prev[Shape::kRowsPerThread],
          dy[Shape::kRowsPerThread], dc_sequence[Shape::kRowsPerThread];
      float state_prev[Shape::kRowsPerThread] = {};
      RowOptions<E> options[Shape::kRowsPerThread];
      FUSED_RNN_UNROLL
      for (int i = 0; i < Shape::kRowsPerThread; ++i) {
        if (!is_unit || block.row(i) >= tile.rows) continue;
        const int64_t b = tile.first + block.row(i), n = t * q.B + b;
        if (kEarlyOptions && q.has_options) options[i].load(q, d, block.direction(), t, b, unit);
        if (t < 0) continue;
        FUSED_RNN_UNROLL
        for (int k = 0; k < Cell::kSaved; ++k) saved_bits[i][k].load(d.saved, (n * Cell::kSaved + k) * H + unit);
        if (Cell::kHasC || d.state_prev) state_prev[i] = d.state_prev[n * H + unit];
        if (Cell::kUsesH && !d.state_prev) h_prev[i].load(d.h_prev, n * Hp + unit);
        if (d.dy) dy[i].load(d.dy, n * d.dy_stride + unit);
        if (Cell::kHasC && d.dc_sequence) dc_sequence[i].load(d.dc_sequence, n * d.dy_stride + unit);
      }
      const auto target = exchange.target(t, tile, block.row(0), unit);

      if (step > 0) {
        const int64_t after = block.time(step - 1, true);
        weights.multiply(exchange.source(after, tile, weights.lane_row(), weights.lane_column()), sums);
      }
      sync_block();
      if (step > 0) reduction.exchange();

      const State<Shape> state(states, block, tile);
      FUSED_RNN_UNROLL
      for (int i = 0; i < Shape::kRowsPerThread; ++i) {
        const int row = block.row(i);
        if (row >= Shape::kRows) break;
        const bool present = is_unit && row < tile.rows;
        float product = 0.0f, dh = state.load(0, i), dc = state.load(1, i), dh_prev = 0.0f;
        if (step > 0) product = reduction.sum(row, block.local_unit());
        if (!present) product = 0.0f;  // NaN if a gradient of the row is NaN
        SplitGradient<float> dh_split{dh + product + dy[i].value(), 0.0f}, dc_split{dc, 0.0f};
        if constexpr (Cell::kHasC) dc_split.to_new += dc_sequence[i].value();
        if (q.has_options && present) {
          const int64_t b = tile.first + row;
          RowOptions<E>& o = options[i];
          if (!kEarlyOptions) o.load(q, d, block.direction(), t, b, unit);
          dh += d.drop_h ? product * o.drop_h.value() : product;
          if (o.restarts()) {
            // The next step read the reset states instead of this step's: they receive the gradients, this step none.
            const int64_t at = block.time(step - 1, true) * d.dreset.step + b * H + unit;
            if (d.dreset.h) store_value<E>(d.dreset.h, at, dh);
            if (d.dreset.c) store_value<E>(d.dreset.c, at, dc);
            dh = dc = 0.0f;
          }
          if (o.active(t)) {
            dh_split = split_gradient(d.zones.h, o.share_h.value(), dh + dy[i].value());
            if constexpr (Cell::kHasC) {
              dc_split = split_gradient(d.zones.c, o.share_c.value(), dc + dc_sequence[i].value());
            }
          } else {  // the gradients stay as they are, and those of the gates are zero
            dh_split = {0.0f, dh}, dc_split = {0.0f, dc};
            h_prev[i] = {}, state_prev[i] = 0.0f;
            FUSED_RNN_UNROLL
            for (int k = 0; k < Cell::kSaved; ++k) saved_bits[i][k] = {};
          }
        }
        if (t < 0) {
          state.store(0, i, dh_split.to_new + dh_split.to_old);
          state.store(1, i, dc_split.to_new + dc_split.to_old);
          continue;
        }
        float saved[Cell::kSaved], grads[Cell::kGrads];
        FUSED_RNN_UNROLL
        for (int k = 0; k < Cell::kSaved; ++k) saved[k] = saved_bits[i][k].value();
        const float h_before = d.state_prev ? state_prev[i] : h_prev[i].value();
        dc = dc_split.to_new;
        Cell::backward(saved, h_before, state_prev[i], dh_split.to_new, dc, grads, dh_prev);
        FUSED_RNN_UNROLL
        for (int k = 0; k < Cell::kGrads; ++k) {
          target.publish(i * Shape::kRowStep, k * Hp, grads[k], row < tile.rows && unit < Hp);
        }
        state.store(0, i, dh_prev + dh_split.to_old);
        state.store(1, i, dc + dc_split.to_old);
      }
      sync_block();
    }
  }

  for (int j = 0; j < q.division.tiles; ++j) {
    const Tile tile = block.tile(j);
    const State<Shape> state(states, block, tile);
    for (int i = 0; i < Shape::kRowsPerThread; ++i) {
      const int row = block.row(i);
      if (row >= tile.rows || !is_unit) break;
      const int64_t at = (tile.first + row) * H + unit;
      if (d.dh0) store_value<E>(d.dh0, at, state.load(0, i));
      if constexpr (Cell::kHasC) {
        if (d.dc0) store_value<E>(d.dc0, at, state.load(1, i));
      }
    }
  }
  exchange.finish();
  reduction.finish();
}

}  // namespace cuda
}  // namespace fused_rnn
