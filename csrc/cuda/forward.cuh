// Forward of a layer's recurrence, all time steps in one launch.
//
// Parallel over directions, teams (batch rows) and parts (units). A block keeps the recurrent weights of its units in
// registers and shared memory for the whole sequence, so that no step loads them again. At every
// step it multiplies them by the h that all parts have published, runs the cell for its own units, and publishes their
// new h. If a block has several tiles of rows, it computes one tile while the words of the others are in flight.
#pragma once

#include "../cells/cells.h"
#include "exchange.cuh"
#include "product.cuh"
#include "regularised.cuh"
#include "row_options.cuh"

namespace fused_rnn {
namespace cuda {

template <class Cell, class E, class Shape>
FUSED_RNN_KERNEL(Shape::kThreads)
forward(const ForwardParams params) {
  constexpr int G = Cell::kGates;
  using Weights = ResidentProduct<E, G, Shape>;
  if constexpr (!can_run(Shape::kExchange)) {
    trap();
    return;
  }
  const Sequence& q = params.sequence;
  const Block<Shape> block(q);
  const ForwardDirection& d = params.direction[block.direction()];
  const int H = q.H, Hp = padded<E>(H), unit = block.unit();
  const bool is_unit = unit < H;
  const Layout layout(Shape::instance(), {G, Hp, sizeof(typename E::Stored)}, q.division.tiles);
  const auto sums = shared_memory<typename Weights::Sums>(layout.sums);
  const auto states = shared_memory<float>(layout.state);
  typename ExchangeFor<E, Shape>::Type exchange(
      Rows<E>{static_cast<typename E::Stored*>(d.h_prev), q.B, Hp, 0, Hp, params.ring}, block, layout,
      block.time(0, false));
  Weights weights(static_cast<const typename E::Stored*>(d.w_hh), H, Hp, Hp, block.first_unit(),
                  shared_memory<Words>(layout.weights));

  float b_ih[G], b_hh[G];
  FUSED_RNN_UNROLL
  for (int gate = 0; gate < G; ++gate) {
    b_ih[gate] = is_unit ? value_or_zero<E>(d.b_ih, gate * H + unit) : 0.0f;
    b_hh[gate] = is_unit ? value_or_zero<E>(d.b_hh, gate * H + unit) : 0.0f;
  }

  // If a thread has one row, its options are loaded before the product; with several rows there are no registers for
  // that.
  constexpr bool kEarlyOptions = Shape::kRowsPerThread == 1;

  for (int j = 0; j < q.division.tiles; ++j) {
    const Tile tile = block.tile(j);
    const State<Shape> state(states, block, tile);
    const auto target = exchange.target(block.time(0, false), tile, block.row(0), unit);
    for (int i = 0; i < Shape::kRowsPerThread; ++i) {
      const int row = block.row(i);
      if (row >= Shape::kRows) break;
      const bool present = is_unit && row < tile.rows;
      const int64_t at = (tile.first + row) * H + unit;
      const float h = present ? value_or_zero<E>(d.h0, at) : 0.0f;
      state.store(0, i, h);
      state.store(1, i, present ? value_or_zero<E>(d.c0, at) : 0.0f);
      const float operand = present ? dropped<E>(d.drop_h, at, h) : 0.0f;
      target.publish(i * Shape::kRowStep, 0, operand, row < tile.rows && unit < Hp);
    }
  }
  sync_block();

  for (int64_t step = 0; step < q.T; ++step) {
    const int64_t t = block.time(step, false), next = block.time(step + 1, false);
    exchange.begin(step);
    for (int j = 0; j < q.division.tiles; ++j) {
      const Tile tile = block.tile(j);
      // Loaded before the product, which hides the latency. Nothing waits for a value before the product is done.
      Early<E> x_gates[Shape::kRowsPerThread][G];
      RowOptions<E> options[Shape::kRowsPerThread];
      FUSED_RNN_UNROLL
      for (int i = 0; i < Shape::kRowsPerThread; ++i) {
        if (!is_unit || block.row(i) >= tile.rows) continue;
        const int64_t b = tile.first + block.row(i), n = t * q.B + b, at = n * (G * static_cast<int64_t>(H)) + unit;
        FUSED_RNN_UNROLL
        for (int gate = 0; gate < G; ++gate) x_gates[i][gate].load(d.x_gates, at + gate * H);
        if (kEarlyOptions && q.has_options) options[i].load(q, d, block.direction(), t, b, unit);
      }
      const auto target = exchange.target(next, tile, block.row(0), unit);

      weights.multiply(exchange.source(t, tile, weights.lane_row(), weights.lane_column()), sums);
      sync_block();

      const State<Shape> state(states, block, tile);
      FUSED_RNN_UNROLL
      for (int i = 0; i < Shape::kRowsPerThread; ++i) {
        const int row = block.row(i);
        if (row >= Shape::kRows) break;
        const int64_t b = tile.first + row, n = t * q.B + b;
        const bool present = is_unit && row < tile.rows;
        const float h_prev = state.load(0, i), c_prev = state.load(1, i);
        float x[G], r[G], saved[Cell::kSaved], h, c = c_prev;
        FUSED_RNN_UNROLL
        for (int gate = 0; gate < G; ++gate) {
          x[gate] = x_gates[i][gate].value() + b_ih[gate];
          r[gate] = b_hh[gate];
        }
        Weights::add(sums, row, block.local_unit(), r);
        Cell::forward(x, r, h_prev, c, saved, h);
        bool active = present;
        float h_next = h, c_next = c, operand = h;
        if (q.has_options && present) {
          RowOptions<E>& o = options[i];
          if (!kEarlyOptions) o.load(q, d, block.direction(), t, b, unit);
          active = o.active(t);
          h_next = h = active ? mixed(d.zones.h, o.share_h.value(), h_prev, h) : h_prev;
          if constexpr (Cell::kHasC) c_next = c = active ? mixed(d.zones.c, o.share_c.value(), c_prev, c) : c_prev;
          if (o.restarts()) {
            h_next = value_or_zero<E>(d.reset.h, next * d.reset.step + b * H + unit);
            c_next = value_or_zero<E>(d.reset.c, next * d.reset.step + b * H + unit);
          }
          operand = d.drop_h ? h_next * o.drop_h.value() : h_next;
        }
        // Before all other stores, because other blocks wait for it.
        if (step + 1 < q.T) {
          target.publish(i * Shape::kRowStep, 0, is_unit ? operand : 0.0f, row < tile.rows && unit < Hp);
        }
        if (!present) continue;
        state.store(0, i, h_next);
        if constexpr (Cell::kHasC) state.store(1, i, c_next);
        const int64_t y_index = n * d.y_stride + unit;
        store_value<E>(d.y, y_index, active ? h : 0.0f);
        if (Cell::kHasC && d.c_sequence) store_value<E>(d.c_sequence, y_index, active ? c : 0.0f);
        if (!active || !d.saved) continue;
        FUSED_RNN_UNROLL
        for (int k = 0; k < Cell::kSaved; ++k) store_value<E>(d.saved, (n * Cell::kSaved + k) * H + unit, saved[k]);
        if (Cell::kHasC || (Cell::kUsesH && d.state_prev)) d.state_prev[n * H + unit] = Cell::kHasC ? c_prev : h_prev;
      }
      exchange.reset(t, tile, block);
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
      store_value<E>(d.h_n, at, state.load(0, i));
      if constexpr (Cell::kHasC) store_value<E>(d.c_n, at, state.load(1, i));
    }
  }
  exchange.finish();
}

}  // namespace cuda
}  // namespace fused_rnn
