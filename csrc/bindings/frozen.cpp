// The operator of frozen models: all layers, in inference, from the bytes of a model (csrc/cpu/frozen_model.h).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../cpu/frozen_model.h"
#include "cpu_layer.h"
#include "scratch.h"

namespace fused_rnn {
namespace bindings {

namespace {

// y [T, B, D * P] or [N, D * P], h_n [L * D, B, P] and c_n [L * D, B, H], which is empty without c. The sizes behind
// `model` are the model's: whoever asks for the shapes of results alone cannot read its bytes. x: [T, B, I], or [N, I]
// with batch_sizes. States: [L * D, B, ...]; those at resets may have one for each step, [T, L * D, B, ...].
std::tuple<Tensor, Tensor, Tensor> frozen(Tensor model, int64_t cell, int64_t layers, int64_t directions,
                                          int64_t hidden_size, int64_t proj_size, Tensor x, OptionalTensor h0,
                                          OptionalTensor c0, OptionalTensor batch_sizes, OptionalTensor lengths,
                                          OptionalTensor resets, OptionalTensor reset_h, OptionalTensor reset_c) {
  require(model, "model", {model.numel()}, ScalarType::Byte, Place(), "a frozen model, uint8");
  model = contiguous(model, "model");
  const auto frozen = cpu::frozen_model(model.data_ptr(), model.numel(), true);
  const cpu::FrozenModel& m = *frozen;
  FUSED_RNN_CHECK(cell_by_number(cell).kind == m.cell && layers == m.layers && directions == m.directions &&
                      hidden_size == m.hidden_size && (proj_size ? proj_size : hidden_size) == m.state_size,
                  "the given cell and sizes are not the model's");
  FUSED_RNN_CHECK(x.scalar_type() == ScalarType::Float, "x must be float32");
  FUSED_RNN_CHECK(x.is_cpu(), "x must be on the CPU");
  const LayerShape last = m.shape(layers - 1);
  const int64_t w_hh[] = {cell_info(m.cell).gates * last.H, last.P};
  CpuLayer layer(cell, x.sizes(), ScalarType::Float, w_hh, last.projected, directions == 2, batch_sizes);
  FUSED_RNN_CHECK(!layer.step, "x must be [T, B, I], or [N, I] with batch_sizes");
  FUSED_RNN_CHECK(layer.shape.I == m.input_size, "x must be ", m.input_size, " wide, got ", layer.shape.I);
  layer.end_at(lengths);
  layer.replace_at(resets);
  LayerShape& s = layer.shape;
  s.weights = m.weights;
  const int64_t rows = layers * directions, B = layer.B;
  x = layer.checked_sequence(x, "x", s.I);
  h0 = layer.readable(h0, "h0", {rows, B, s.P});
  c0 = layer.readable(c0, "c0", {rows, B, s.H});
  FUSED_RNN_CHECK(m.has_c || !(c0 || reset_c), "only the LSTM has c");
  FUSED_RNN_CHECK(resets || !(reset_h || reset_c), "reset_h and reset_c need resets");
  const auto checked_reset = [&](const OptionalTensor& state, const char* name, int64_t width) {
    if (!state || state->dim() != 4) return layer.readable(state, name, {rows, B, width});
    return layer.readable(state, name, {layer.T, rows, B, width});
  };
  reset_h = checked_reset(reset_h, "reset_h", s.P), reset_c = checked_reset(reset_c, "reset_c", s.H);

  const Tensor h_n = layer.new_tensor({rows, B, s.P});
  const Tensor c_n = m.has_c ? layer.copy_or_zeros(c0, layer.new_tensor({rows, B, s.H})) : layer.new_tensor({0});
  layer.pass_on(h0, h_n);
  Tensor y = x;
  for (int64_t l = 0; l < layers; ++l) {
    const Tensor below = y;
    s.I = m.shape(l).I;
    y = layer.new_sequence(directions * s.P);
    layer.clear_absent(y, directions * s.P);
    if (s.N == 0) continue;
    const int64_t workspace = whole_lines(cpu::kernels().forward_workspace(s));
    const Scratch scratch(directions * workspace * layer.element());
    ForwardParams params{s, {}};
    for (int64_t d = 0; d < directions; ++d) {
      const int64_t row = l * directions + d;
      const auto of_row = [&](const OptionalTensor& state, int64_t width) -> char* {
        return state ? layer.offset(*state, row * B * width) : nullptr;
      };
      const auto of_step = [&](const OptionalTensor& state, int64_t width) {
        return state && state->dim() == 4 ? rows * B * width : 0;
      };
      ForwardDirection& p = params.direction[d] = m.direction(l, d);
      p.x = below.data_ptr();
      p.h0 = of_row(h0, s.P);
      p.reset = {of_row(reset_h, s.P), of_row(reset_c, s.H), of_step(reset_h, s.P), of_step(reset_c, s.H)};
      p.y = layer.offset(y, d * s.P);
      p.y_stride = directions * s.P;
      p.h_n = layer.offset(h_n, row * B * s.P);
      p.c = m.has_c ? layer.offset(c_n, row * B * s.H) : nullptr;
      p.workspace = scratch.data() + d * workspace * layer.element();
    }
    cpu::forward(cpu::kernels(), params, torch::stable::get_num_threads());
  }
  return {y, h_n, c_n};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_rnn, m) {
  m.def(
      "frozen(Tensor model, int cell, int layers, int directions, int hidden_size, int proj_size, Tensor x, "
      "Tensor? h0=None, Tensor? c0=None, Tensor? batch_sizes=None, Tensor? lengths=None, Tensor? resets=None, "
      "Tensor? reset_h=None, Tensor? reset_c=None) -> (Tensor y, Tensor h_n, Tensor c_n)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) { m.impl("frozen", TORCH_BOX(&frozen)); }

}  // namespace bindings
}  // namespace fused_rnn
