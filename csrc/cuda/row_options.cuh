// What a layer's options say about one batch row at one step: lengths, resets, recurrent dropout and zoneout.
#pragma once

#include "element.h"
#include "params.h"

namespace fused_rnn {
namespace cuda {

// A reset marks a border between two steps, at which both directions restart. The direction's first step is excluded:
// the host itself replaces h0 and c0.
template <class E>
struct RowOptions {
  int64_t later = 0;  // the later of the two steps at the border between step t and the direction's next step
  int32_t length = INT32_MAX;
  uint8_t reset = 0;
  Early<E> drop_h, share_h, share_c;

  // Loads what the layer has; the members' users wait for it. t < 0: no step, only what is behind it.
  template <class Direction>
  FUSED_RNN_DEVICE void load(const Sequence& sequence, const Direction& d, int direction, int64_t t, int64_t b,
                             int unit) {
    const int64_t n = t * sequence.B + b;
    later = direction == 0 ? t + 1 : t;
    if (sequence.lengths) length = sequence.lengths[b];
    if (sequence.resets && later > 0 && later < sequence.T) reset = sequence.resets[later * sequence.B + b];
    if (d.drop_h) drop_h.load(d.drop_h, b * sequence.H + unit);
    if (d.zones.h.at && t >= 0) share_h.load(d.zones.h.at, n * d.zones.h.stride + unit);
    if (d.zones.c.at && t >= 0) share_c.load(d.zones.c.at, n * d.zones.c.stride + unit);
  }

  // Whether the row has a step at time t.
  FUSED_RNN_DEVICE bool active(int64_t t) const { return t < length; }
  // Whether the states are replaced between step t and the next one.
  FUSED_RNN_DEVICE bool restarts() const { return reset && active(later); }
};

}  // namespace cuda
}  // namespace fused_rnn
