// One layer's shape from its tensors, and the one checker of the operators of every device: each size, dtype and device
// against all others, so that a kernel can rely on them.
#pragma once

#include "cell_number.h"
#include "options.h"
#include "ragged.h"

namespace fused_rnn {
namespace bindings {

struct Weights {
  OptionalTensor w_ih;
  Tensor w_hh;
  OptionalTensor b_ih, b_hh, w_hr;
};

class Layer {
 public:
  const CellInfo& cell;
  Place place;
  LayerShape shape{};
  bool step = false;     // x is [B, I], states [B, ...]: one time step, no time dimension in the results
  ScalarType stored;     // dtype of x and of all that comes in or goes out
  ScalarType dtype;      // that the kernels read and write; where it is another one, tensors are converted
  int64_t T = 0, B = 0;  // of the tensors; shape may have less of both where rows have ends, see RaggedRows
  bool packed = false;   // x is [N, I]
  OptionalTensor resets;
  RaggedRows ragged;

  // x: [T, B, I]; [N, I] with batch_sizes; [B, I] for a single step. w_hh: its sizes, [G*H, P].
  Layer(int64_t cell_number, const Place& place, torch::headeronly::IntHeaderOnlyArrayRef x, ScalarType stored,
        ScalarType dtype, torch::headeronly::IntHeaderOnlyArrayRef w_hh, bool projected, bool two_directions,
        const OptionalTensor& batch_sizes)
      : cell(cell_by_number(cell_number)), place(place), stored(stored), dtype(dtype) {
    require_dtype(stored);
    FUSED_RNN_CHECK(w_hh.size() == 2, "w_hh must have 2 dimensions, got ", w_hh.size());
    FUSED_RNN_CHECK(w_hh[0] <= kMost, "w_hh has too many rows: ", w_hh[0]);
    FUSED_RNN_CHECK(w_hh[0] % cell.gates == 0, "w_hh must have a multiple of ", cell.gates, " rows, got ", w_hh[0]);
    shape.cell = cell.kind;
    shape.dtype = dtype == ScalarType::Float ? Dtype::kFloat32 : Dtype::kFloat64;
    shape.H = w_hh[0] / cell.gates;
    shape.P = w_hh[1];
    shape.directions = two_directions ? 2 : 1;
    shape.projected = projected;
    FUSED_RNN_CHECK(!shape.projected || cell.kind == CellKind::kLstm, "only the LSTM has a projection");
    FUSED_RNN_CHECK(shape.projected || shape.P == shape.H, "w_hh must have shape ",
                    shape_text(std::vector<int64_t>{shape.H * cell.gates, shape.H}), ", got ", shape_text(w_hh));
    FUSED_RNN_CHECK(!shape.projected || shape.P > 0, "a projection has at least one row, got w_hh of shape ",
                    shape_text(w_hh));
    step = x.size() == 2 && !batch_sizes;
    FUSED_RNN_CHECK(x.size() == (step || batch_sizes ? 2 : 3),
                    "x must be [T, B, I], [N, I] with batch_sizes, or [B, I], got ", shape_text(x));
    FUSED_RNN_CHECK(!step || !two_directions, "a single step has one direction");
    shape.I = x[x.size() - 1];
    if (batch_sizes) {
      pack(*batch_sizes, x[0]);
    } else {
      shape.T = step ? 1 : x[0];
      shape.B = step ? x[0] : x[1];
      FUSED_RNN_CHECK(!__builtin_mul_overflow(shape.T, shape.B, &shape.N), "x has too many rows: ", shape_text(x));
    }
    FUSED_RNN_CHECK(shape.N <= kMost && shape.I <= kMost, "x is too large: ", shape_text(x));
    FUSED_RNN_CHECK(shape.T > 0, "Expected sequence length to be larger than 0 in RNN");
    T = shape.T, B = shape.B;
  }

  // resets: bool, a value for each row of x.
  void replace_at(const OptionalTensor& given) {
    if (!given) return;
    FUSED_RNN_CHECK(!step, "a single step has no resets");
    resets = packed ? checked(*given, "resets", {shape.N}, ScalarType::Bool, place)
                    : checked(*given, "resets", {T, B}, ScalarType::Bool, place);
    shape.resets = static_cast<const uint8_t*>(resets->data_ptr());
  }
  // A state that comes in at resets: [D, B, width], or with one for each step [T, D, B, width].
  OptionalTensor checked_reset(const OptionalTensor& state, const char* name, int64_t width) const {
    FUSED_RNN_CHECK(!state || resets, name, " needs resets");
    if (!state || state->dim() != 4) return readable(state, name, {shape.directions, B, width});
    return readable(state, name, {T, shape.directions, B, width});
  }

  // Without w_ih, x holds the gates' share of every direction.
  void without_input_weights(bool given, bool given_reverse) {
    FUSED_RNN_CHECK(shape.directions == 1 ? !given_reverse : given == given_reverse,
                    "the reverse direction needs w_ih and w_hh");
    shape.gates_given = !given;
    const int64_t width = shape.directions * cell.gates * shape.H;
    FUSED_RNN_CHECK(given || shape.I == width, "without w_ih, x must have ", width, " columns, got ", shape.I);
  }
  void regularise(Options& o) {
    shape.drops_h = o.drop_h.has_value();
    shape.zones_h = o.zone_h.has_value();
    shape.normalised = o.norm_hh.has_value();
    const int64_t D = shape.directions;
    FUSED_RNN_CHECK(cell.has_c || !(o.zone_c || o.norm_c || o.norm_c_bias), "only the LSTM has c");
    FUSED_RNN_CHECK(o.norm_c || !o.norm_c_bias, "norm_c_bias goes with norm_c");
    o.drop_h = checked_state(o.drop_h, "drop_h", shape.P);
    o.zone_h = checked_zone(o.zone_h, "zone_h", D * shape.P);
    o.zone_c = checked_zone(o.zone_c, "zone_c", D * shape.H);
    o.norm_hh = readable(o.norm_hh, "norm_hh", {D, cell.gates * shape.H});
    o.norm_c = readable(o.norm_c, "norm_c", {D, shape.H});
    o.norm_c_bias = readable(o.norm_c_bias, "norm_c_bias", {D, shape.H});
  }
  // For each row of y, or one for all of them.
  OptionalTensor checked_zone(const OptionalTensor& zone, const char* name, int64_t width) const {
    if (!zone) return std::nullopt;
    return zone->dim() == 1 ? readable(*zone, name, {width}) : checked_sequence(*zone, name, width);
  }

  int64_t element() const { return element_size(dtype); }
  char* offset(const Tensor& tensor, int64_t elements) const {
    return static_cast<char*>(tensor.data_ptr()) + elements * element();
  }

  // What the kernels read: contiguous, in their dtype.
  Tensor readable(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) const {
    return readable(tensor, name, sizes, dtype);
  }
  OptionalTensor readable(const OptionalTensor& tensor, const char* name, std::initializer_list<int64_t> sizes) const {
    return readable(tensor, name, sizes, dtype);
  }
  Tensor readable(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes, ScalarType as) const {
    return converted(checked(tensor, name, sizes, stored, place), as);
  }
  OptionalTensor readable(const OptionalTensor& tensor, const char* name, std::initializer_list<int64_t> sizes,
                          ScalarType as) const {
    if (!tensor) return std::nullopt;
    return readable(*tensor, name, sizes, as);
  }

  Weights checked_weights(const OptionalTensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
                          const OptionalTensor& b_hh, const OptionalTensor& w_hr) const {
    return checked_weights(w_ih, w_hh, b_ih, b_hh, w_hr, dtype);
  }
  // The matrices are converted to `as`.
  Weights checked_weights(const OptionalTensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
                          const OptionalTensor& b_hh, const OptionalTensor& w_hr, ScalarType as) const {
    const int64_t rows = cell.gates * shape.H;
    FUSED_RNN_CHECK(w_hr.has_value() == shape.projected, "both directions need w_hr, or neither");
    return {readable(w_ih, "w_ih", {rows, shape.I}, as), readable(w_hh, "w_hh", {rows, shape.P}, as),
            readable(b_ih, "b_ih", {rows}), readable(b_hh, "b_hh", {rows}),
            readable(w_hr, "w_hr", {shape.P, shape.H}, as)};
  }

  // [D, B, width], or [B, width] of a single step.
  OptionalTensor checked_state(const OptionalTensor& state, const char* name, int64_t width) const {
    return step ? readable(state, name, {B, width}) : readable(state, name, {shape.directions, B, width});
  }
  Tensor new_tensor(std::initializer_list<int64_t> sizes) const { return empty(sizes, dtype, place); }
  Tensor new_state(int64_t width) const {
    return step ? new_tensor({B, width}) : new_tensor({shape.directions, B, width});
  }
  // x, y and their gradients.
  Tensor new_sequence(int64_t width) const {
    if (step) return new_tensor({B, width});
    return packed ? new_tensor({shape.N, width}) : new_tensor({T, B, width});
  }
  Tensor checked_sequence(const Tensor& sequence, const char* name, int64_t width) const {
    if (step) return readable(sequence, name, {B, width});
    return packed ? readable(sequence, name, {shape.N, width}) : readable(sequence, name, {T, B, width});
  }

 private:
  static constexpr int64_t kMost = INT64_MAX / 8;  // of rows, and of columns that take no memory: sums of them are safe

  void pack(const Tensor& sizes, int64_t rows) {
    FUSED_RNN_CHECK(sizes.is_cpu() && sizes.scalar_type() == ScalarType::Long && sizes.dim() == 1,
                    "batch_sizes must be a 1-D int64 tensor on the CPU");
    shape.T = sizes.size(0);
    FUSED_RNN_CHECK(shape.T > 0, "batch_sizes must not be empty");
    const Tensor given = contiguous(sizes, "batch_sizes");
    const int64_t* at = static_cast<const int64_t*>(given.data_ptr());
    ragged.batch_sizes.assign(at, at + shape.T);
    at = shape.batch_sizes = ragged.batch_sizes.data();
    packed = true;
    shape.B = at[0];
    ragged.row_offsets.resize(shape.T);
    for (int64_t t = 0; t < shape.T; ++t) {
      FUSED_RNN_CHECK(at[t] > 0 && at[t] <= (t ? at[t - 1] : rows), "batch_sizes must be positive and not increase");
      ragged.row_offsets[t] = shape.N;
      shape.N += at[t];
    }
    FUSED_RNN_CHECK(shape.N == rows, "batch_sizes must sum to the rows of x: ", shape.N, " is not ", rows);
    shape.row_offsets = ragged.row_offsets.data();
  }
};

}  // namespace bindings
}  // namespace fused_rnn
