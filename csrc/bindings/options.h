// The optional tensors of a layer. The operators take them as one list, `options`: all of them in this order, or none.
//
// fused_rnn/options.py has the same order, and fused_rnn/reference.py says what they mean.
#pragma once

#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "tensors.h"

namespace fused_rnn {
namespace bindings {

using GivenOptions = std::optional<std::vector<OptionalTensor>>;

struct Options {
  OptionalTensor batch_sizes, resets, lengths, drop_h, zone_h, zone_c, reset_h, reset_c, norm_hh, norm_c, norm_c_bias;

  Options() = default;
  explicit Options(const GivenOptions& given) {
    if (!given) return;
    const auto all = fields();
    FUSED_RNN_CHECK(given->size() == all.size(), "options must have ", all.size(), " entries, got ", given->size());
    for (size_t i = 0; i < all.size(); ++i) *all[i] = (*given)[i];
  }
  // As the operators take them.
  GivenOptions as_list() {
    GivenOptions list{std::in_place};
    for (const OptionalTensor* field : fields()) list->push_back(*field);
    return list;
  }

 private:
  std::array<OptionalTensor*, 11> fields() {
    return {&batch_sizes, &resets,  &lengths, &drop_h, &zone_h,     &zone_c,
            &reset_h,     &reset_c, &norm_hh, &norm_c, &norm_c_bias};
  }
};

}  // namespace bindings
}  // namespace fused_rnn
