// How the callers of all layers lay out a sequence, and the operators' [T, B, ...] from it and back. Nothing is copied.
#pragma once

#include <utility>
#include <vector>

#include "tensors.h"

namespace fused_rnn {
namespace bindings {

// x, y and their gradients are [T, B, ...]; [B, T, ...]; of one sequence without a batch [T, ...], whose states are
// [L*D, ...]; or of a single step [B, ...]. So are resets, without the last dimension.
enum class Layout : int64_t { kTimeFirst, kBatchFirst, kUnbatched, kStep };

inline Layout layout_by_number(int64_t number) {
  FUSED_RNN_CHECK(number >= 0 && number <= static_cast<int64_t>(Layout::kStep), "there is no layout ", number);
  return static_cast<Layout>(number);
}

// [T, B, ...], of `dims` dimensions, from a tensor of this layout.
inline Tensor time_first(const Tensor& tensor, const char* name, Layout layout, int64_t dims) {
  const bool has_both = layout == Layout::kTimeFirst || layout == Layout::kBatchFirst;
  const int64_t given = has_both ? dims : dims - 1;
  FUSED_RNN_CHECK(tensor.dim() == given, name, " must have ", given, " dimensions, got ", tensor.dim());
  if (layout == Layout::kTimeFirst) return tensor;
  std::vector<int64_t> sizes, strides;
  for (int64_t i = 0; i < given; ++i) sizes.push_back(tensor.size(i)), strides.push_back(tensor.stride(i));
  if (layout == Layout::kBatchFirst) {
    std::swap(sizes[0], sizes[1]), std::swap(strides[0], strides[1]);
  } else {
    const int64_t missing = layout == Layout::kUnbatched ? 1 : 0;
    sizes.insert(sizes.begin() + missing, 1), strides.insert(strides.begin() + missing, 0);
  }
  return viewed(tensor, sizes, strides, 0);
}
inline OptionalTensor time_first(const OptionalTensor& tensor, const char* name, Layout layout, int64_t dims) {
  if (!tensor) return std::nullopt;
  return time_first(*tensor, name, layout, dims);
}

// A tensor of this layout from [T, B, ...].
inline Tensor laid_out(const Tensor& sequence, Layout layout) {
  if (layout == Layout::kTimeFirst) return sequence;
  if (layout == Layout::kBatchFirst) return time_first(sequence, "a result", layout, sequence.dim());
  const int64_t surplus = layout == Layout::kUnbatched ? 1 : 0;
  std::vector<int64_t> sizes, strides;
  for (int64_t i = 0; i < sequence.dim(); ++i) {
    if (i != surplus) sizes.push_back(sequence.size(i)), strides.push_back(sequence.stride(i));
  }
  return viewed(sequence, sizes, strides, 0);
}

}  // namespace bindings
}  // namespace fused_rnn
