// Checks the ring of exchanged rows where a block is so late that the others give up: they must not take what it left
// there at the ring's last turn for what it has not published yet. The kernels alone cannot show it, as none is late.
#include <vector>

#include "exchange.cuh"
#include "self_test.h"

namespace self_test {
namespace {

using namespace fused_rnn::cuda;
using RingShape = Shape<Exchange::kThroughL2, 1, 2, 2>;

struct Ring {
  Sequence sequence;
  uint32_t* rows;  // [directions, kRingSteps, B, H]
  int late_block;  // waits at step late_step for delay nanoseconds
  int64_t late_step;
  uint64_t delay;
  int* missing_words;  // counts the words that were not ready when their reader timed out
  int* wrong_words;    // counts those of another step
};

// Every block of a team reads all rows. Each value is the number of its step. Blocks that have given up run ahead, so
// that the late one finds values of later steps; a layer's are NaN then.
FUSED_RNN_KERNEL(64) ring(Ring p) {
  const Sequence& q = p.sequence;
  const Block<RingShape> block(q);
  ThroughL2<Tf32, RingShape> exchange(
      {reinterpret_cast<float*>(p.rows) + block.direction() * kRingSteps * q.B * q.H, q.B, q.H, 0, q.H, kRingSteps - 1},
      block, Layout(RingShape::instance(), {1, q.H, 4}, q.division.tiles), 0);
  const auto publish = [&](int64_t step, const Tile& tile) {
    const auto target = exchange.target(block.time(step, false), tile, block.row(0), block.unit());
    for (int i = 0; i < RingShape::kRowsPerThread; ++i) {
      const bool exists = block.row(i) < tile.rows && block.unit() < q.H;
      target.publish(i * RingShape::kRowStep, 0, static_cast<float>(step), exists);
    }
  };
  for (int j = 0; j < q.division.tiles; ++j) publish(0, block.tile(j));
  sync_block();
  for (int64_t step = 0; step < q.T; ++step) {
    const int64_t t = block.time(step, false);
    exchange.begin(step);
    for (int j = 0; j < q.division.tiles; ++j) {
      const Tile tile = block.tile(j);
      const int lane_row = thread_index() % 32 / 4;
      const auto source = exchange.source(t, tile, lane_row, 0);
      for (int row_tile = 0; row_tile < RingShape::kRowTiles; ++row_tile) {
        for (int column = thread_index() % 4 * 4; column < q.H; column += 16) {
          const int row = row_tile * kTileRows + lane_row;
          Words words[1] = {source.load(row_tile, column)};
          source.wait(words, row_tile, column, 0);
          for (int i = 0; i < 4 && row < tile.rows; ++i) {
            const float found = fused_rnn::math::bits<float>(words[0].w[i]), expected = static_cast<float>(step);
            *p.missing_words += words[0].w[i] == kNotReady;
            *p.wrong_words += found < expected || (found > expected && p.late_block < 0);
          }
        }
      }
      sync_block();
      if (block_index() == p.late_block && step == p.late_step) {
        const uint64_t start = nanoseconds();
        while (nanoseconds() - start < p.delay) relax();
      }
      if (step + 1 < q.T) publish(step + 1, tile);
      exchange.reset(t, tile, block);
      sync_block();
    }
  }
}

}  // namespace

void test_ring() {
  for (uint64_t seed = 0; seed < 2; ++seed) {
    set_schedule_seed(seed);
    for (const int directions : {1, 2}) {
      for (const bool late : {false, true}) {
        Sequence q{};
        q.T = 2 * kRingSteps + 25, q.B = 40, q.last_row = 40, q.H = 36, q.directions = directions;
        q.division = {3, 2, 2};                      // the last tile has no rows
        q.error = error_word(), q.patience = 50000;  // a round of the emulator takes 1000
        std::vector<Words> rows(directions * kRingSteps * q.B * q.H / 4,
                                Words{{kNotReady, kNotReady, kNotReady, kNotReady}});
        int missing_words = 0, wrong_words = 0;
        const Ring p{q, rows[0].w, late ? 1 : -1, 70, 2000000, &missing_words, &wrong_words};
        *error_word() = 0;
        const int shared_bytes = Layout(RingShape::instance(), {1, q.H, 4}, 2).total;
        expect_success("ring", ring, {6 * directions, 64, shared_bytes, true}, p);
        expect(wrong_words == 0, "that no word is of an earlier step");
        expect((*error_word() != 0) == late && (missing_words != 0) == late, "that only a late block is given up");
      }
    }
  }
  *error_word() = 0;
}

}  // namespace self_test
