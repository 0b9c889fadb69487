// One layer's tensors: every size checked against every other, and where each lies.
#pragma once

#include <cstring>

#include "cell_info.h"
#include "ragged.h"

namespace fused_rnn {
namespace bindings {

struct Weights {
  OptionalTensor w_ih;
  Tensor w_hh;
  OptionalTensor b_ih, b_hh, w_hr;
};

// Of both directions; see Variant.
struct VariantTensors {
  OptionalTensor drop_h, zone_h, zone_c, norm_hh, norm_c, norm_c_bias;
};

// The layer's shape from its tensors, every size checked against every other.
class Layer {
 public:
  CellInfo cell;
  LayerShape shape{};
  bool step = false;  // x is [B, I], states [B, ...]: one time step, no time dimension in the results
  ScalarType stored = ScalarType::Float;  // dtype of x and of all that comes in or goes out
  ScalarType dtype = ScalarType::Float;   // that the kernels compute in: 16-bit tensors are widened for them
  int64_t T = 0, B = 0;  // of the tensors; shape has less of both where rows end before T, or have no step at all
  bool packed = false;   // x is [N, I]
  OptionalTensor resets;
  RaggedRows ragged;

  // x: [T, B, I], perhaps with lengths; [N, I] with batch_sizes; [B, I] for a single step. w_hh: [G*H, P].
  Layer(int64_t kind, torch::headeronly::IntHeaderOnlyArrayRef x, ScalarType type, const Tensor& w_hh,
        const OptionalTensor& w_hr, bool two_directions, const OptionalTensor& sizes, const OptionalTensor& lengths)
      : cell(cell_info(kind)), stored(type), dtype(type == ScalarType::Double ? type : ScalarType::Float) {
    FUSED_RNN_CHECK(stored == dtype || stored == ScalarType::BFloat16 || stored == ScalarType::Half,
                    "x must be float32, float64, bfloat16 or float16");
    FUSED_RNN_CHECK(w_hh.dim() == 2, "w_hh must have 2 dimensions, got ", w_hh.dim());
    FUSED_RNN_CHECK(w_hh.size(0) <= kMost, "w_hh has too many rows: ", w_hh.size(0));
    FUSED_RNN_CHECK(w_hh.size(0) % cell.gates == 0, "w_hh must have a multiple of ", cell.gates, " rows, got ",
                    w_hh.size(0));
    shape.cell = cell.kind;
    shape.dtype = dtype == ScalarType::Float ? Dtype::kFloat32 : Dtype::kFloat64;
    shape.H = w_hh.size(0) / cell.gates;
    shape.P = w_hh.size(1);
    shape.directions = two_directions ? 2 : 1;
    shape.projected = w_hr.has_value();
    FUSED_RNN_CHECK(!shape.projected || cell.kind == CellKind::kLstm, "only the LSTM has a projection");
    FUSED_RNN_CHECK(shape.projected || shape.P == shape.H, "w_hh must have shape ",
                    shape_text(std::vector<int64_t>{shape.H * cell.gates, shape.H}), ", got ",
                    shape_text(w_hh.sizes()));
    FUSED_RNN_CHECK(!shape.projected || shape.P > 0, "a projection has at least one row, got w_hh of shape ",
                    shape_text(w_hh.sizes()));
    step = x.size() == 2 && !sizes;
    FUSED_RNN_CHECK(x.size() == (step || sizes ? 2 : 3),
                    "x must be [T, B, I], [N, I] with batch_sizes, or [B, I], got ", shape_text(x));
    FUSED_RNN_CHECK(!step || !two_directions, "a single step has one direction");
    shape.I = x[x.size() - 1];
    if (sizes) {
      pack(*sizes, x[0]);
    } else {
      shape.T = step ? 1 : x[0];
      shape.B = step ? x[0] : x[1];
      FUSED_RNN_CHECK(!__builtin_mul_overflow(shape.T, shape.B, &shape.N), "x has too many rows: ", shape_text(x));
    }
    FUSED_RNN_CHECK(shape.N <= kMost && shape.I <= kMost, "x is too large: ", shape_text(x));
    FUSED_RNN_CHECK(shape.T > 0, "Expected sequence length to be larger than 0 in RNN");
    T = shape.T, B = shape.B;
    if (!lengths) return;
    FUSED_RNN_CHECK(!step && !sizes, "lengths need x to be [T, B, I]");
    ragged.of_lengths(*lengths, T, B);
    ragged.describe(shape);
  }

  bool chains_h() const { return shape.chains_h(cell.saves_h); }
  int64_t reserve_rows() const { return chains_h() ? shape.N + shape.B : shape.N; }
  int64_t reserve_width() const {
    if (chains_h()) return shape.H;
    return cell.saved * shape.H + shape.P + (cell.has_c ? shape.H : 0) + (shape.projected ? shape.H : 0) +
           (keeps_h_direct() ? shape.P : 0) + (shape.normalised ? cell.gates * shape.H + 1 : 0);
  }
  bool keeps_h_direct() const { return cell.uses_h && shape.drops_h; }

  // Where forward in training keeps a direction's values: [D, reserve_rows(), reserve_width()].
  Reserve reserve(void* base, int64_t direction) const {
    const int64_t width = reserve_width();
    char* at = static_cast<char*>(base) + direction * reserve_rows() * width * element();
    if (chains_h()) {
      char* next = at + shape.B * width * element();
      Reserve r{};
      r.gates = direction == 0 ? next : at;
      r.h_prev = direction == 0 ? at : next;
      r.stride = width;
      return r;
    }
    const auto take = [&](bool present, int64_t elements) {
      char* const taken = present ? at : nullptr;
      at += present ? elements * element() : 0;
      return taken;
    };
    Reserve r{};
    r.gates = take(true, cell.saved * shape.H);
    r.h_prev = take(true, shape.P);
    r.c_prev = take(cell.has_c, shape.H);
    r.hidden = take(shape.projected, shape.H);
    r.h_direct = take(keeps_h_direct(), shape.P);
    r.h_hat = take(shape.normalised, cell.gates * shape.H + 1);
    r.stride = width;
    return r;
  }

  // resets: bool, a value for each row of x; call before reserve_rows().
  void replace_at(const OptionalTensor& given) {
    if (!given) return;
    FUSED_RNN_CHECK(!step, "a single step has no resets");
    resets = packed ? checked(*given, "resets", {shape.N}, ScalarType::Bool)
                    : checked(*given, "resets", {T, B}, ScalarType::Bool);
    shape.resets = static_cast<const uint8_t*>(resets->data_ptr());
  }
  // A state that comes in at resets: [D, B, width], or with one for each step [T, D, B, width].
  OptionalTensor checked_reset(const OptionalTensor& state, const char* name, int64_t width) const {
    FUSED_RNN_CHECK(!state || resets, name, " needs resets");
    if (!state || state->dim() != 4) return readable(state, name, {shape.directions, B, width});
    return readable(state, name, {T, shape.directions, B, width});
  }
  ResetState reset_state(const OptionalTensor& h, const OptionalTensor& c, int64_t direction) const {
    const auto of = [&](const OptionalTensor& state, int64_t width, void*& at, int64_t& stride) {
      if (!state || !state->defined() || state->numel() == 0) return;
      at = offset(*state, direction * B * width);
      stride = state->dim() == 4 ? shape.directions * B * width : 0;
    };
    ResetState found{};
    of(h, shape.P, found.h, found.step_h);
    of(c, shape.H, found.c, found.step_c);
    return found;
  }

  // Without w_ih, x holds the gates' share of every direction. Call this and the next before reserve_width().
  void without_input_weights(bool given, bool given_reverse) {
    FUSED_RNN_CHECK(shape.directions == 1 ? !given_reverse : given == given_reverse,
                    "the reverse direction needs w_ih and w_hh");
    shape.gates_given = !given;
    const int64_t width = shape.directions * cell.gates * shape.H;
    FUSED_RNN_CHECK(given || shape.I == width, "without w_ih, x must have ", width, " columns, got ", shape.I);
  }
  void regularise(VariantTensors& v) {
    shape.drops_h = v.drop_h.has_value();
    shape.zones_h = v.zone_h.has_value();
    shape.normalised = v.norm_hh.has_value();
    const int64_t D = shape.directions;
    FUSED_RNN_CHECK(cell.has_c || !(v.zone_c || v.norm_c || v.norm_c_bias), "only the LSTM has c");
    FUSED_RNN_CHECK(!shape.normalised || shape.gates_given, "norm_hh needs x to hold the gates' share: no w_ih");
    FUSED_RNN_CHECK(
        v.norm_c.has_value() == (cell.has_c && shape.normalised) && v.norm_c_bias.has_value() == v.norm_c.has_value(),
        "the LSTM's norm_c and norm_c_bias go with norm_hh");
    v.drop_h = checked_state(v.drop_h, "drop_h", shape.P);
    v.zone_h = checked_zone(v.zone_h, "zone_h", D * shape.P);
    v.zone_c = checked_zone(v.zone_c, "zone_c", D * shape.H);
    v.norm_hh = readable(v.norm_hh, "norm_hh", {D, cell.gates * shape.H});
    v.norm_c = readable(v.norm_c, "norm_c", {D, shape.H});
    v.norm_c_bias = readable(v.norm_c_bias, "norm_c_bias", {D, shape.H});
  }
  // For each row of y, or one for all of them.
  OptionalTensor checked_zone(const OptionalTensor& zone, const char* name, int64_t width) const {
    if (!zone) return std::nullopt;
    return zone->dim() == 1 ? readable(*zone, name, {width}) : checked_sequence(*zone, name, width);
  }
  Variant variant(const VariantTensors& v, int64_t direction) const {
    const auto at = [&](const OptionalTensor& tensor, int64_t elements) -> const void* {
      return tensor ? offset(*tensor, direction * elements) : nullptr;
    };
    // Not the tensor's own stride, which says nothing where there is one row.
    const auto stride = [&](const OptionalTensor& zone, int64_t width) {
      return zone && zone->dim() > 1 ? shape.directions * width : 0;
    };
    return {at(v.drop_h, B * shape.P), at(v.zone_h, shape.P),     at(v.zone_c, shape.H),
            stride(v.zone_h, shape.P), stride(v.zone_c, shape.H), at(v.norm_hh, cell.gates * shape.H),
            at(v.norm_c, shape.H),     at(v.norm_c_bias, shape.H)};
  }

  int64_t element() const { return dtype == ScalarType::Float ? 4 : 8; }
  void* offset(const Tensor& tensor, int64_t elements) const {
    return static_cast<char*>(tensor.data_ptr()) + elements * element();
  }

  // What the kernels read: contiguous, in their dtype.
  Tensor readable(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) const {
    return converted(checked(tensor, name, sizes, stored), dtype);
  }
  OptionalTensor readable(const OptionalTensor& tensor, const char* name, std::initializer_list<int64_t> sizes) const {
    if (!tensor) return std::nullopt;
    return readable(*tensor, name, sizes);
  }

  Weights checked_weights(const OptionalTensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
                          const OptionalTensor& b_hh, const OptionalTensor& w_hr) const {
    const int64_t rows = cell.gates * shape.H;
    FUSED_RNN_CHECK(w_hr.has_value() == shape.projected, "both directions need w_hr, or neither");
    return {readable(w_ih, "w_ih", {rows, shape.I}), readable(w_hh, "w_hh", {rows, shape.P}),
            readable(b_ih, "b_ih", {rows}), readable(b_hh, "b_hh", {rows}), readable(w_hr, "w_hr", {shape.P, shape.H})};
  }

  // [D, B, width], or [B, width] of a single step.
  OptionalTensor checked_state(const OptionalTensor& state, const char* name, int64_t width) const {
    return step ? readable(state, name, {B, width}) : readable(state, name, {shape.directions, B, width});
  }
  Tensor new_state(int64_t width) const {
    return step ? empty({B, width}, dtype) : empty({shape.directions, B, width}, dtype);
  }
  // What the kernels turn from c0 into c_n; empty without c.
  Tensor first_c(const OptionalTensor& c0) const {
    FUSED_RNN_CHECK(cell.has_c || !c0, "only the LSTM has c0");
    if (!cell.has_c) return empty({0}, dtype);
    return copy_or_zeros(checked_state(c0, "c0", shape.H), new_state(shape.H));
  }
  Tensor copy_or_zeros(const OptionalTensor& from, const Tensor& to) const {
    if (to.numel() == 0) return to;
    if (from) {
      std::memcpy(to.data_ptr(), from->data_ptr(), to.numel() * element());
    } else {
      std::memset(to.data_ptr(), 0, to.numel() * element());
    }
    return to;
  }
  // x, y and their gradients.
  Tensor new_sequence(int64_t width) const {
    if (step) return empty({B, width}, dtype);
    return packed ? empty({shape.N, width}, dtype) : empty({T, B, width}, dtype);
  }
  Tensor checked_sequence(const Tensor& sequence, const char* name, int64_t width) const {
    if (step) return readable(sequence, name, {B, width});
    return packed ? readable(sequence, name, {shape.N, width}) : readable(sequence, name, {T, B, width});
  }
  // Zeros where rows have ended.
  void clear_absent(const Tensor& sequence, int64_t width) const {
    ragged.each_absent([&](int64_t row) { std::memset(offset(sequence, row * width), 0, width * element()); });
  }
  // What a row without a step hands on.
  void pass_on(const OptionalTensor& from, const Tensor& to) const {
    if (shape.B < B) copy_or_zeros(from, to);
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
