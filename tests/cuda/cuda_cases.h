// The layers that cuda_check.cpp computes: sizes around the borders of tiles, blocks and clusters, and options.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "layout.h"

namespace fused_rnn {
namespace cuda {
namespace check {

// The batch has `tiles_of_rows` whole tiles and `rows` more rows; the device has room for `teams` and `tiles`.
// instances: 'a': kAlone; 's': kSplitColumns; of the others 'o': one warp of units; 't': two or more warps of units;
// 'r': only instances with row_tiles = 1. flags: as in Layer, and 'q': included in --quick.
struct Case {
  int64_t H, T;
  int directions, teams, tiles;
  int64_t tiles_of_rows, rows;
  const char *instances, *flags;
  bool has(char flag) const { return std::strchr(flags, flag) != nullptr; }
  bool runs(const Instance& i) const {
    const char kind = i.exchange == Exchange::kAlone          ? 'a'
                      : i.exchange == Exchange::kSplitColumns ? 's'
                      : i.unit_warps == 1                     ? 'o'
                                                              : 't';
    return std::strchr(instances, kind) && (i.row_tiles == 1 || !std::strchr(instances, 'r'));
  }
  // H, adjusted for clusters, which have 2 to 8 parts.
  int64_t units(const Instance& i) const {
    const int64_t parts = (H + i.units() - 1) / i.units(), most = kMaxClusterBlocks;
    if (i.exchange != Exchange::kThroughCluster) return H;
    return parts < 2 ? H + i.units() : H - std::max<int64_t>(0, parts - most) * i.units();
  }
};

const Case kCases[] = {
    {37, 3, 2, 2, 2, 2, 5, "aots", "bsdclpq"},  // two directions, two teams, one of which has an empty tile
    {21, 3, 2, 2, 2, 4, 3, "aors", "bsdceq"},   // a second launch
    {103, 3, 1, 1, 1, 1, 2, "a", "sdlq"},       // a second launch; columns in shared memory
    {37, 3, 1, 1, 1, 0, 6, "aots", "bdnlq"},    // NaN
    {29, 3, 2, 1, 2, 1, 2, "aots", "sdclpmq"},  // masks
    {37, 3, 2, 1, 1, 0, 5, "aots", "bsdcq"},    // without options
    {21, 4, 2, 2, 2, 4, 3, "aors", "bsdcv"},   {1, 1, 1, 1, 1, 0, 1, "aots", "dp"},
    {17, 5, 1, 1, 1, 0, 1, "aots", "sz"},      {128, 2, 2, 1, 2, 2, 3, "a", "bsdlz"},
    {64, 3, 2, 2, 3, 5, 0, "aotrs", "sdl"},  // nothing to pad
    {403, 2, 1, 1, 1, 0, 3, "tr", "bsd"},    // columns in shared memory, split over several warps
    {1030, 2, 1, 1, 1, 0, 3, "s", "sd"},     // the same, split over several blocks
    {260, 3, 1, 1, 2, 1, 5, "s", "sdlq"},    // several clusters in a team
};

}  // namespace check
}  // namespace cuda
}  // namespace fused_rnn
