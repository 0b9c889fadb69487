// A layer for the CPU's kernels: where in memory each of its tensors has what a kernel reads and writes.
//
// The kernels compute in float32 and float64; 16-bit tensors are widened before and narrowed after them, but for
// bfloat16 weights, which forward reads as they are.
#pragma once

#include <cstring>
#include <utility>

#include "../cpu/dispatch.h"
#include "../cpu/memory.h"
#include "layer.h"
#include "schemas.h"

namespace fused_rnn {
namespace bindings {

inline ForwardDirection inputs_of_forward(const Tensor& x, const Weights& w) {
  ForwardDirection p{};
  p.x = data(x);
  p.w_ih = data(w.w_ih);
  p.w_hh = data(w.w_hh);
  p.b_ih = data(w.b_ih);
  p.b_hh = data(w.b_hh);
  p.w_hr = data(w.w_hr);
  return p;
}

class CpuLayer : public Layer {
 public:
  const cpu::Kernels& kernels;

  // instance: see schemas.h.
  CpuLayer(int64_t cell_number, torch::headeronly::IntHeaderOnlyArrayRef x, ScalarType stored,
           torch::headeronly::IntHeaderOnlyArrayRef w_hh, bool projected, bool two_directions,
           const OptionalTensor& batch_sizes, int64_t instance = kPlanned)
      : Layer(cell_number, Place(), x, stored, stored == ScalarType::Double ? stored : ScalarType::Float, w_hh,
              projected, two_directions, batch_sizes),
        kernels(cpu::kernels(instance)) {}

  // `precision` of float32's products, a cpu::Precision; that of bfloat16 tensors is bfloat16's. `forward`, unlike
  // backward, reads bfloat16 weights as they are.
  void choose_products(int64_t precision, bool forward) {
    FUSED_RNN_CHECK(precision >= 0 && precision < cpu::kPrecisions, "precision must be between 0 and ",
                    cpu::kPrecisions - 1, ", got ", precision);
    const bool is_bf16 = stored == ScalarType::BFloat16;
    const auto of_float32 = is_bf16 ? cpu::Precision::kMedium : static_cast<cpu::Precision>(precision);
    cpu::choose_products(kernels, shape, of_float32, torch::stable::get_num_threads());
    shape.bf16_weights = forward && is_bf16;
  }
  Weights checked_weights(const OptionalTensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
                          const OptionalTensor& b_hh, const OptionalTensor& w_hr) const {
    return Layer::checked_weights(w_ih, w_hh, b_ih, b_hh, w_hr, shape.bf16_weights ? stored : dtype);
  }
  // lengths: int32 or int64 [B]. Rows that end leave shape with fewer rows, worked on longest first.
  void end_at(const OptionalTensor& lengths) {
    if (!lengths) return;
    FUSED_RNN_CHECK(!step && !packed, "lengths need x to be [T, B, I]");
    RaggedRows rows;
    rows.of_lengths(*lengths, T, B);
    end_at(std::move(rows));
  }
  void end_at(RaggedRows rows) {
    ragged = std::move(rows);
    ragged.describe(shape);
  }
  // The kernels normalise both products or none, and c with them.
  void regularise(Options& o) {
    Layer::regularise(o);
    FUSED_RNN_CHECK(!shape.normalised || shape.gates_given, "norm_hh needs x to hold the gates' share: no w_ih");
    FUSED_RNN_CHECK(
        o.norm_c.has_value() == (cell.has_c && shape.normalised) && o.norm_c_bias.has_value() == o.norm_c.has_value(),
        "the LSTM's norm_c and norm_c_bias go with norm_hh");
  }

  // The next two need all that was checked above.
  bool chains_h() const { return shape.chains_h(cell.saves_h); }
  int64_t reserve_rows() const { return chains_h() ? shape.N + shape.B : shape.N; }
  int64_t reserve_width() const {
    if (chains_h()) return shape.H;
    return cell.saved * shape.H + shape.P + (cell.has_c ? shape.H : 0) + (shape.projected ? shape.H : 0) +
           (keeps_h_direct() ? shape.P : 0) + (shape.normalised ? cell.gates * shape.H + 1 : 0);
  }
  // For so many directions, of one layer or several.
  Tensor new_reserve(int64_t directions) const {
    // So much memory the system's allocator asks the kernel for at every call; less, it keeps, with its pages.
    constexpr int64_t kAlwaysFresh = 32 << 20;
    const Tensor reserve = new_tensor({directions, reserve_rows(), reserve_width()});
    const int64_t bytes = reserve.numel() * element();
    if (bytes >= kAlwaysFresh) cpu::ask_for_huge_pages(reserve.data_ptr(), bytes);
    return reserve;
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

  Variant variant(const Options& o, int64_t direction) const {
    const auto at = [&](const OptionalTensor& tensor, int64_t elements) -> const void* {
      return tensor ? offset(*tensor, direction * elements) : nullptr;
    };
    // Not the tensor's own stride, which says nothing where there is one row.
    const auto zone = [&](const OptionalTensor& tensor, int64_t width) -> Zone {
      return {at(tensor, width), tensor && tensor->dim() > 1 ? shape.directions * width : 0};
    };
    return {at(o.drop_h, B * shape.P),
            {zone(o.zone_h, shape.P), zone(o.zone_c, shape.H)},
            at(o.norm_hh, cell.gates * shape.H),
            at(o.norm_c, shape.H),
            at(o.norm_c_bias, shape.H)};
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
  // Zeros where rows have ended.
  void clear_absent(const Tensor& sequence, int64_t width) const {
    ragged.each_absent([&](int64_t row) { std::memset(offset(sequence, row * width), 0, width * element()); });
  }
  // What a row without a step hands on.
  void pass_on(const OptionalTensor& from, const Tensor& to) const {
    if (shape.B < B) copy_or_zeros(from, to);
  }
};

}  // namespace bindings
}  // namespace fused_rnn
