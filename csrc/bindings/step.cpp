// One time step of one layer in inference, from given tensors into given tensors, for a loop that may allocate nothing:
// the state may be updated where it lies, rows may keep theirs, or get another one before the step.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "../cpu/dispatch.h"
#include "layer.h"
#include "scratch.h"

namespace fused_rnn {
namespace bindings {

namespace {

// A tensor and where it lies in memory.
struct Extent {
  const char* name;
  const char *begin = nullptr, *end = nullptr;
  bool whole = false;

  Extent(const char* name, const OptionalTensor& tensor) : name(name) {
    if (!tensor || tensor->numel() == 0) return;
    FUSED_RNN_CHECK(tensor->is_cpu(), name, " must be on the CPU");
    whole = tensor->is_contiguous();
    int64_t last = tensor->numel();
    if (!whole) {
      last = 1;
      for (int64_t d = 0; d < tensor->dim(); ++d) last += (tensor->size(d) - 1) * tensor->stride(d);
    }
    begin = static_cast<const char*>(tensor->data_ptr());
    end = begin + last * tensor->element_size();
  }
  bool meets(const Extent& other) const { return begin < other.end && other.begin < end; }
  bool is(const Extent& other) const { return begin == other.begin && end == other.end && whole && other.whole; }
};

// Of [L, B, width] the rows of one layer: as they lie if they lie side by side, else copied.
const void* rows_of(const OptionalTensor& state, int64_t layer, char* copy) {
  if (!state) return nullptr;
  const int64_t size = state->element_size(), bytes = state->size(2) * size, distance = state->stride(1) * size;
  const char* const from = static_cast<const char*>(state->data_ptr()) + layer * state->stride(0) * size;
  if (distance == bytes) return from;
  for (int64_t b = 0; b < state->size(1); ++b) std::memcpy(copy + b * bytes, from + b * distance, bytes);
  return copy;
}

// [L, B, width] of whole rows, which may be the same row for all of B.
OptionalTensor checked_reset(const OptionalTensor& state, const char* name, std::initializer_list<int64_t> sizes,
                             ScalarType type) {
  if (!state) return std::nullopt;
  const bool expanded = state->dim() == 3 && state->stride(2) == 1 && state->stride(1) == 0;
  if (!expanded) return checked(*state, name, sizes, type);
  checked(torch::stable::narrow(const_cast<Tensor&>(*state), 1, 0, 1), name, {*sizes.begin(), 1, sizes.end()[-1]},
          type);
  FUSED_RNN_CHECK(state->size(1) == sizes.begin()[1], name, " must have shape ", shape_text(sizes));
  return state;
}

void copy_or_clear(void* to, const void* from, int64_t bytes) {
  if (from) {
    std::memmove(to, from, bytes);
  } else {
    std::memset(to, 0, bytes);
  }
}

// States are those of all layers, [L, B, ...]; without x it is h of the layer below. The last layer writes y [B, P].
// active [B]: rows where it is false keep their state, and y is zero there. resets [B]: of the others, the rows whose
// state is replaced before the step.
void step_into(OptionalTensor x, OptionalTensor h0, OptionalTensor c0, int64_t layer, int64_t cell, Tensor w_ih,
               Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr, OptionalTensor active,
               OptionalTensor resets, OptionalTensor reset_h, OptionalTensor reset_c, Tensor y, Tensor h,
               OptionalTensor c, bool deterministic) {
  const ScalarType type = h.scalar_type();
  FUSED_RNN_CHECK(type == ScalarType::Float || type == ScalarType::Double, "h must be float32 or float64");
  FUSED_RNN_CHECK(h.dim() == 3 && h.is_contiguous(), "h must be contiguous [L, B, P], got ", shape_text(h.sizes()));
  const int64_t L = h.size(0), B = h.size(1), P = h.size(2);
  FUSED_RNN_CHECK(layer >= 0 && layer < L, "layer must be between 0 and ", L - 1, ", got ", layer);
  FUSED_RNN_CHECK(w_ih.dim() == 2, "w_ih must be [G*H, I], got ", shape_text(w_ih.sizes()));
  const int64_t of_x[] = {B, w_ih.size(1)};
  Layer one(cell, Place(), of_x, type, type, w_hh.sizes(), w_hr.has_value(), false, std::nullopt);
  const CellInfo& info = one.cell;
  LayerShape& s = one.shape;
  const int64_t I = s.I, H = s.H;
  FUSED_RNN_CHECK(P > 0 && P == s.P, "h must be ", s.P, " wide, got ", P);
  FUSED_RNN_CHECK(x || (layer > 0 && I == P), "x is missing, or w_ih does not fit h");
  FUSED_RNN_CHECK(c.has_value() == info.has_c && (info.has_c || !(c0 || reset_c)),
                  "the LSTM, and no other cell, has c");
  FUSED_RNN_CHECK(resets || !(reset_h || reset_c), "reset_h and reset_c need resets");

  const Extent all[] = {
      {"y", y}, {"h", h}, {"c", c}, {"x", x}, {"h0", h0}, {"c0", c0}, {"reset_h", reset_h}, {"reset_c", reset_c}};
  for (int i = 0; i < 3; ++i) {
    for (int j = i + 1; j < 8; ++j) {
      const bool in_place = i > 0 && j == i + 3 && all[i].is(all[j]);  // h0 in h, c0 in c
      FUSED_RNN_CHECK(in_place || !all[i].meets(all[j]), all[i].name, " must not share memory with ", all[j].name);
    }
  }
  require(y, "y", {B, P}, type);
  FUSED_RNN_CHECK(P == 1 || y.stride(1) == 1, "y must have contiguous rows");
  FUSED_RNN_CHECK(B < 2 || y.stride(0) >= P, "rows of y must not overlap");
  if (c) require(*c, "c", {L, B, H}, type);
  FUSED_RNN_CHECK(!c || c->is_contiguous(), "c must be contiguous");
  x = one.readable(x, "x", {B, I});
  h0 = one.readable(h0, "h0", {L, B, P});
  c0 = one.readable(c0, "c0", {L, B, H});
  const Weights w = one.checked_weights(w_ih, w_hh, b_ih, b_hh, w_hr);
  active = checked(active, "active", {B}, ScalarType::Bool);
  resets = checked(resets, "resets", {B}, ScalarType::Bool);
  reset_h = checked_reset(reset_h, "reset_h", {L, B, P}, type);
  reset_c = checked_reset(reset_c, "reset_c", {L, B, H}, type);

  s.deterministic = deterministic;
  const cpu::Kernels& k = cpu::kernels();
  cpu::choose_products(k, s, cpu::Precision::kHighest, torch::stable::get_num_threads());
  s.resets = static_cast<const uint8_t*>(data(resets));
  const auto* const is_active = static_cast<const uint8_t*>(data(active));

  // Scratch: the kernel's, y of a lower layer, states at resets, the rows that are active.
  const int64_t size = one.element();
  const int64_t workspace = whole_lines(k.forward_workspace(s)) * size;
  const int64_t of_h = whole_lines(B * P) * size, of_c = whole_lines(B * H) * size;
  const Scratch scratch(workspace + 2 * of_h + of_c + B * static_cast<int64_t>(sizeof(int64_t)));
  char* next = scratch.data() + workspace;
  char *const lower_y = next, *const at_reset_h = next += of_h, *const at_reset_c = next += of_h;
  if (is_active) {
    auto* const order = reinterpret_cast<int64_t*>(next + of_c);
    s.B = s.N = 0;  // the workspace was for all rows, which is enough
    for (int64_t b = 0; b < B; ++b) {
      if (is_active[b]) order[s.N++] = b;
    }
    s.B = s.N;
    s.order = s.places = order;
  }

  const auto of_layer = [&](const OptionalTensor& state, int64_t index, int64_t width) -> char* {
    return state ? static_cast<char*>(state->data_ptr()) + index * B * width * size : nullptr;
  };
  const bool last = layer == L - 1;
  ForwardParams params{s, {}};
  ForwardDirection& p = params.direction[0];
  p.x = x ? data(x) : of_layer(h, layer - 1, P);
  p.w_ih = data(w.w_ih), p.w_hh = data(w.w_hh), p.b_ih = data(w.b_ih), p.b_hh = data(w.b_hh), p.w_hr = data(w.w_hr);
  p.h0 = of_layer(h0, layer, P);
  p.y = last ? y.data_ptr() : lower_y;
  p.y_stride = last && B > 1 ? y.stride(0) : P;
  p.h_n = of_layer(h, layer, P);
  p.c = of_layer(c, layer, H);
  p.workspace = scratch.data();
  p.reset.h = const_cast<void*>(rows_of(reset_h, layer, at_reset_h));
  p.reset.c = const_cast<void*>(rows_of(reset_c, layer, at_reset_c));
  if (is_active && p.h_n != p.h0) copy_or_clear(p.h_n, p.h0, B * P * size);
  const void* const first_c = of_layer(c0, layer, H);
  if (c && p.c != first_c) copy_or_clear(p.c, first_c, B * H * size);
  for (int64_t b = 0; last && is_active && b < B; ++b) {
    if (!is_active[b]) std::memset(static_cast<char*>(p.y) + b * p.y_stride * size, 0, P * size);
  }
  if (s.N > 0) cpu::forward(k, params, torch::stable::get_num_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_rnn, m) {
  m.def(
      "step_into(Tensor? x, Tensor? h0, Tensor? c0, int layer, int cell, Tensor w_ih, Tensor w_hh, Tensor? b_ih, "
      "Tensor? b_hh, Tensor? w_hr, Tensor? active, Tensor? resets, Tensor? reset_h, Tensor? reset_c, Tensor(a!) y, "
      "Tensor(b!) h, Tensor(c!)? c, bool deterministic=False) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) { m.impl("step_into", TORCH_BOX(&step_into)); }

}  // namespace bindings
}  // namespace fused_rnn
