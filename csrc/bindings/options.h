// The optional tensors of a layer. The operators take them as one list, `options`: all of them in this order, or none.
//
// fused_rnn/options.py has the same order, and fused_rnn/reference.py says what they mean.
#pragma once

#include <iterator>
#include <optional>
#include <vector>

#include "tensors.h"

namespace fused_rnn {
namespace bindings {

using GivenOptions = std::optional<std::vector<OptionalTensor>>;

struct Options {
  OptionalTensor batch_sizes, resets, lengths, drop_h, zone_h, zone_c, reset_h, reset_c, norm_hh, norm_c, norm_c_bias;

  explicit Options(const GivenOptions& given) {
    if (!given) return;
    OptionalTensor* const fields[] = {&batch_sizes, &resets,  &lengths, &drop_h, &zone_h,     &zone_c,
                                      &reset_h,     &reset_c, &norm_hh, &norm_c, &norm_c_bias};
    FUSED_RNN_CHECK(given->size() == std::size(fields), "options must have ", std::size(fields), " entries, got ",
                    given->size());
    for (size_t i = 0; i < given->size(); ++i) *fields[i] = (*given)[i];
  }
};

}  // namespace bindings
}  // namespace fused_rnn
