// Counts the bank conflicts of the warps' accesses to shared memory, from the layout alone: partial sums as they are
// stored and loaded, and exchanged rows as they are loaded. Shared memory has 32 banks of 4 bytes; lanes that together
// access 128 bytes conflict if two of them need different words of one bank.
#include <cstdio>
#include <set>
#include <string>
#include <vector>

#include "layout.h"

namespace {

using namespace fused_rnn::cuda;

int accesses = 0, failures = 0;

// bytes: of each lane; offset(lane): negative if the lane does not take part.
template <class Offset>
void check(const std::string& what, int bytes, const Offset& offset) {
  const int together = 128 / bytes;
  ++accesses;
  for (int first = 0; first < 32; first += together) {
    std::vector<std::set<int>> words(32);
    for (int lane = first; lane < first + together; ++lane) {
      for (int i = 0; i < bytes && offset(lane) >= 0; i += 4)
        words[(offset(lane) + i) / 4 % 32].insert(offset(lane) + i);
    }
    for (const std::set<int>& bank : words) {
      if (bank.size() <= 1) continue;
      if (++failures <= 20) std::printf("%s: %d words of one bank\n", what.c_str(), static_cast<int>(bank.size()));
      return;
    }
  }
}

template <class Shape>
void check_sums(const std::string& name, int gates) {
  const PartialSums sums{gates, Shape::kRows};
  const int bytes = 4 * sums.width();
  for (int warp = 0; warp < Shape::kThreads / 32; ++warp) {
    for (int tile = 0; tile < Shape::kRowTiles; ++tile) {
      for (int i = 0; i < 4; ++i) {
        check("sums stored, " + name, bytes,
              [&](int lane) { return bytes * sums.at(warp, kTileRows * tile + sum_row(lane, i), sum_unit(lane, i)); });
      }
    }
    for (int i = 0; i < Shape::kRowsPerThread; ++i) {
      for (int depth = 0; depth < Shape::kDepthWarps; ++depth) {
        check("sums loaded, " + name, bytes, [&](int lane) {
          const int thread = 32 * warp + lane, unit = Shape::unit(thread), row = Shape::row(thread, i);
          if (row >= Shape::kRows) return -1;
          return bytes * sums.at(depth * Shape::kUnitWarps + unit / kTileUnits, row, unit % kTileUnits);
        });
      }
    }
  }
}

// The sums that the blocks of a cluster exchange.
template <class Shape>
void check_exchanged_sums(const std::string& name) {
  const PartialSums sums{kSplitBlocks, Shape::kRows};
  for (int warp = 0; warp < Shape::kDepthWarps; ++warp) {
    for (int to = 0; to < kSplitBlocks; ++to) {
      for (int tile = 0; tile < Shape::kRowTiles; ++tile) {
        const int first = kTileRows * tile;
        for (int i = 0; i < 4; ++i) {
          check("sums for other blocks stored, " + name, 4,
                [&](int lane) { return 4 * sums.at(warp, first + sum_row(lane, i), sum_unit(lane, i), to); });
        }
        check("sums for other blocks loaded, " + name, 16,
              [&](int lane) { return 4 * sums.at(warp, first + lane / 4, lane % 4 * 4, to); });
      }
    }
  }
}

void check_rows(const std::string& name, const Instance& instance, int columns) {
  const Layout layout(instance, {1, columns, 2}, 1);
  check("rows loaded, " + name, 16, [&](int lane) { return lane / 4 * layout.slot_stride + lane % 4 * 16; });
}

}  // namespace

int main() {
  for (const int gates : {1, 3, 4}) {
#define CHECK_SUMS(exchange, unit_warps, depth_warps, row_tiles)             \
  check_sums<Shape<Exchange::exchange, unit_warps, depth_warps, row_tiles>>( \
      #unit_warps "x" #depth_warps "x" #row_tiles ", gates: " + std::to_string(gates), gates);
    FUSED_RNN_INSTANCES(CHECK_SUMS)
  }
#define CHECK_EXCHANGED(exchange, unit_warps, depth_warps, row_tiles)                                                \
  if (Exchange::exchange == Exchange::kSplitColumns) {                                                               \
    check_exchanged_sums<Shape<Exchange::exchange, unit_warps, depth_warps, row_tiles>>(#unit_warps "x" #depth_warps \
                                                                                                    "x" #row_tiles); \
  }
  FUSED_RNN_INSTANCES(CHECK_EXCHANGED)
  for (const int columns : {8, 64, 128, 200, 512, 4096}) {
#define CHECK_ROWS(exchange, unit_warps, depth_warps, row_tiles) \
  check_rows(#exchange ", columns: " + std::to_string(columns),  \
             {Exchange::exchange, unit_warps, depth_warps, row_tiles}, columns);
    FUSED_RNN_INSTANCES(CHECK_ROWS)
  }
  std::printf("%d accesses, %d failures\n", accesses, failures);
  return failures != 0;
}
