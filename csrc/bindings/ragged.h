// A padded batch whose rows end at different steps, as the kernels take it: the rows with steps longest first, and the
// place of each in the batch. Nothing is copied.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "../rnn_params.h"
#include "tensors.h"

namespace fused_rnn {
namespace bindings {

struct RaggedRows {
  int64_t T = 0, B = 0;                                          // of the batch
  std::vector<int64_t> lengths;                                  // [B]; empty: every row has T steps
  std::vector<int64_t> batch_sizes, row_offsets, places, order;  // as in LayerShape; our own: another thread may
                                                                 // write to the caller's

  // given: int32 or int64 [B], 0 to T.
  void of_lengths(const Tensor& given, int64_t steps, int64_t rows) {
    T = steps, B = rows;
    const bool wide = given.scalar_type() == ScalarType::Long;
    FUSED_RNN_CHECK(wide || given.scalar_type() == ScalarType::Int, "lengths must be int32 or int64");
    const Tensor tensor = checked(given, "lengths", {B}, wide ? ScalarType::Long : ScalarType::Int);
    lengths.resize(B);
    bool all = true;
    for (int64_t b = 0; b < B; ++b) {
      lengths[b] =
          wide ? static_cast<const int64_t*>(tensor.data_ptr())[b] : static_cast<const int32_t*>(tensor.data_ptr())[b];
      FUSED_RNN_CHECK(lengths[b] >= 0 && lengths[b] <= T, "lengths must be between 0 and ", T, ", got ", lengths[b]);
      all = all && lengths[b] == T;
    }
    if (all) lengths.clear();
  }

  void describe(LayerShape& shape) {
    if (lengths.empty()) return;
    shape.T = *std::max_element(lengths.begin(), lengths.end());
    batch_sizes.assign(shape.T + 1, 0);  // first the rows of each length, then those that are longer than t
    for (const int64_t length : lengths) ++batch_sizes[length];
    int64_t longer = 0;
    for (int64_t t = shape.T; t >= 0; --t) longer += std::exchange(batch_sizes[t], longer);
    shape.B = batch_sizes[0];
    std::vector<int64_t> next = batch_sizes;  // where a row of each length goes: behind the longer ones
    order.resize(shape.B);
    for (int64_t b = 0; b < B; ++b) {
      if (lengths[b] > 0) order[next[lengths[b]]++] = b;
    }
    row_offsets.resize(shape.T);
    shape.N = 0;
    for (int64_t t = 0; t < shape.T; ++t) row_offsets[t] = shape.N, shape.N += batch_sizes[t];
    places.resize(shape.N);
    for (int64_t t = 0, n = 0; t < shape.T; ++t) {
      for (int64_t b = 0; b < batch_sizes[t]; ++b) places[n++] = t * B + order[b];
    }
    shape.batch_sizes = batch_sizes.data(), shape.row_offsets = row_offsets.data();
    shape.places = places.data(), shape.order = order.data();
  }

  // Calls f(row) for the rows of [T * B, ...] behind their ends.
  template <class F>
  void each_absent(const F& f) const {
    if (lengths.empty()) return;
    for (int64_t t = *std::min_element(lengths.begin(), lengths.end()); t < T; ++t) {
      for (int64_t b = 0; b < B; ++b) {
        if (lengths[b] <= t) f(t * B + b);
      }
    }
  }
};

}  // namespace bindings
}  // namespace fused_rnn
