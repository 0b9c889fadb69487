// What a call of all layers is, beside its tensors, and the layouts of its sequences: the operators' [T, B, ...] from a
// caller's tensor and back. Nothing is copied.
#pragma once

#include <utility>

#include "tensors.h"

namespace fused_rnn {
namespace bindings {

// The parts of a call in the order in which all functions take them, after x, h0, c0 and the weights.
enum CallPart { kCell, kLayers, kDirections, kHasBiases, kProjected, kLayout, kResets, kLengths, kCallParts };

// x, y and their gradients are [T, B, ...]; [B, T, ...]; of one sequence without a batch [T, ...], whose states are
// [L*D, ...]; or of a single step [B, ...]. So are resets, without the last dimension.
enum class Layout : int64_t { kTimeFirst, kBatchFirst, kUnbatched, kStep };

inline Layout layout_by_number(int64_t number) {
  FUSED_RNN_CHECK(number >= 0 && number <= static_cast<int64_t>(Layout::kStep), "there is no layout ", number);
  return static_cast<Layout>(number);
}

// The sizes and strides of a view.
struct Dimensions {
  int64_t count = 0, sizes[3], strides[3];
  void add(int64_t size, int64_t stride) { sizes[count] = size, strides[count++] = stride; }
  void add(const Tensor& tensor, int64_t dimension) { add(tensor.size(dimension), tensor.stride(dimension)); }
  Tensor of(const Tensor& tensor) const {
    const auto size = static_cast<size_t>(count);
    return viewed(tensor, {sizes, size}, {strides, size}, 0);
  }
};

// [T, B, ...], of `dims` dimensions, 2 or 3, from a tensor of this layout.
inline Tensor time_first(const Tensor& tensor, const char* name, Layout layout, int64_t dims) {
  const bool has_both = layout == Layout::kTimeFirst || layout == Layout::kBatchFirst;
  const int64_t given = has_both ? dims : dims - 1;
  FUSED_RNN_CHECK(tensor.dim() == given, name, " must have ", given, " dimensions, got ", tensor.dim());
  if (layout == Layout::kTimeFirst) return tensor;
  Dimensions view;
  if (layout == Layout::kBatchFirst) view.add(tensor, 1);
  if (layout == Layout::kStep) view.add(1, 0);
  view.add(tensor, 0);
  if (layout == Layout::kUnbatched) view.add(1, 0);
  for (int64_t i = has_both ? 2 : 1; i < given; ++i) view.add(tensor, i);
  return view.of(tensor);
}
inline OptionalTensor time_first(const OptionalTensor& tensor, const char* name, Layout layout, int64_t dims) {
  if (!tensor) return std::nullopt;
  return time_first(*tensor, name, layout, dims);
}

// A tensor of this layout from [T, B, width].
inline Tensor laid_out(const Tensor& sequence, Layout layout) {
  if (layout == Layout::kTimeFirst) return sequence;
  Dimensions view;
  if (layout != Layout::kUnbatched) view.add(sequence, 1);
  if (layout != Layout::kStep) view.add(sequence, 0);
  view.add(sequence, 2);
  return view.of(sequence);
}

}  // namespace bindings
}  // namespace fused_rnn
