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
  const Shared<float> sums = shared_memory<float>(layout.sums), states = shared_memory<float>(layout.state);
  typename ExchangeFor<E, Shape>::Type exchange(Rows<E>{static_cast<typename E::Stored*>(d.h_prev), q.B, Hp, 0, Hp},
                                                block, layout, block.time(0, false));
  Weights weights(static_cast<const typename E::Stored*>(d.w_hh), H, Hp, block.first_unit(),
                  shared_memory<Words>(layout.weights));

  float b_ih[G], b_hh[G];
  FUSED_RNN_UNROLL
  for (int gate = 0; gate < G; ++gate) {
    b_ih[gate] = is_unit ? value_or_zero<E>(d.b_ih, gate * H + unit) : 0.0f;
    b_hh[gate] = is_unit ? value_or_zero<E>(d.b_hh, gate * H + unit) : 0.0f;
  }

  const auto publish = [&](int64_t t, const Tile& tile, int row, float h) {
    if (is_unit && row < tile.rows) h = dropped<E>(d.drop_h, (tile.first + row) * H + unit, h);
    in_words<E>(h, [&](uint32_t word) {
      if (row < tile.rows && unit < Hp) exchange.publish(t, tile, row, unit, word);
    });
  };

  for (int j = 0; j < q.division.tiles; ++j) {
    const Tile tile = block.tile(j);
    const State<Shape> state(states, block, tile);
    for (int i = 0; i < Shape::kRowsPerThread; ++i) {
      const int row = block.row(i);
      if (row >= Shape::kRows) break;
      const bool present = is_unit && row < tile.rows;
      const int64_t at = (tile.first + row) * H + unit;
      const float h = present ? value_or_zero<E>(d.h0, at) : 0.0f;
      state.store(0, i, h);
      state.store(1, i, present ? value_or_zero<E>(d.c0, at) : 0.0f);
      publish(block.time(0, false), tile, row, h);
    }
  }
  sync_block();

  for (int64_t step = 0; step < q.T; ++step) {
    const int64_t t = block.time(step, false);
    for (int j = 0; j < q.division.tiles; ++j) {
      const Tile tile = block.tile(j);
      // Loaded before the product, which hides the latency. Nothing waits for a value before the product is done.
      Early<E> x_gates[Shape::kRowsPerThread][G];
      RowSteps steps[Shape::kRowsPerThread];
      Shares<E, Shape> share_h(d.zones.h), share_c(d.zones.c);
      FUSED_RNN_UNROLL
      for (int i = 0; i < Shape::kRowsPerThread; ++i) {
        if (!is_unit || block.row(i) >= tile.rows) continue;
        const int64_t b = tile.first + block.row(i), n = t * q.B + b, at = n * (G * static_cast<int64_t>(H)) + unit;
        FUSED_RNN_UNROLL
        for (int gate = 0; gate < G; ++gate) x_gates[i][gate].load(d.x_gates, at + gate * H);
        steps[i].load(q, block.direction(), t, b);
        share_h.load(n, unit);
        if constexpr (Cell::kHasC) share_c.load(n, unit);
      }

      weights.multiply(exchange.source(t, tile, weights.lane_row(), weights.lane_column()), sums);
      sync_block();

      const State<Shape> state(states, block, tile);
      FUSED_RNN_UNROLL
      for (int i = 0; i < Shape::kRowsPerThread; ++i) {
        const int row = block.row(i);
        if (row >= Shape::kRows) break;
        const int64_t b = tile.first + row, at = (t * q.B + b) * H + unit;
        const bool present = is_unit && row < tile.rows;
        const float h_prev = state.load(0, i), c_prev = state.load(1, i);
        float x[G], r[G], saved[Cell::kSaved], h, c = c_prev;
        FUSED_RNN_UNROLL
        for (int gate = 0; gate < G; ++gate) {
          r[gate] = Weights::sum(sums, gate, row, block.local_unit()) + b_hh[gate];
          x[gate] = x_gates[i][gate].value() + b_ih[gate];
        }
        Cell::forward(x, r, h_prev, c, saved, h);
        const bool active = present && steps[i].active(t);
        h = active ? mixed(d.zones.h, share_h.get(t * q.B + b, unit), h_prev, h) : h_prev;
        if constexpr (Cell::kHasC) c = active ? mixed(d.zones.c, share_c.get(t * q.B + b, unit), c_prev, c) : c_prev;
        if (present) {
          const int64_t y_index = (t * q.B + b) * d.y_stride + unit;
          store_value<E>(d.y, y_index, active ? h : 0.0f);
          if (Cell::kHasC && d.c_sequence) store_value<E>(d.c_sequence, y_index, active ? c : 0.0f);
        }
        if (step + 1 < q.T) {
          const int64_t next = block.time(step + 1, false);
          if (present && steps[i].restarts()) {
            h = value_or_zero<E>(d.reset.h, next * d.reset.step + b * H + unit);
            c = value_or_zero<E>(d.reset.c, next * d.reset.step + b * H + unit);
          }
          publish(next, tile, row, is_unit ? h : 0.0f);
        }
        if (present) {
          state.store(0, i, h);
          state.store(1, i, c);
        }
        if (active) {
          if (d.saved) {
            FUSED_RNN_UNROLL
            for (int k = 0; k < Cell::kSaved; ++k) {
              store_value<E>(d.saved, ((t * q.B + b) * Cell::kSaved + k) * H + unit, saved[k]);
            }
            if (Cell::kHasC || (Cell::kUsesH && d.state_prev)) d.state_prev[at] = Cell::kHasC ? c_prev : h_prev;
          }
        }
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
      store_value<E>(d.h_n, at, state.load(0, i));
      if constexpr (Cell::kHasC) store_value<E>(d.c_n, at, state.load(1, i));
    }
  }
  exchange.finish();
}

}  // namespace cuda
}  // namespace fused_rnn
