// The operators: one layer, in one or two directions, forward and backward. They check everything that a kernel
// relies on, so that no call from Python can reach bad memory, and allocate.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "cpu_layer.h"
#include "cpu_operators.h"
#include "scratch.h"

namespace fused_rnn {
namespace bindings {

namespace {

int64_t threads() { return torch::stable::get_num_threads(); }

}  // namespace

Results forward(Tensor x, OptionalTensor h0, OptionalTensor c0, int64_t cell, bool train, OptionalTensor w_ih,
                Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr, OptionalTensor w_ih_reverse,
                OptionalTensor w_hh_reverse, OptionalTensor b_ih_reverse, OptionalTensor b_hh_reverse,
                OptionalTensor w_hr_reverse, GivenOptions given, bool want_c_sequence, bool deterministic, bool,
                int64_t precision, int64_t instance) {
  Options options(given);
  CpuLayer layer(cell, x.sizes(), x.scalar_type(), w_hh.sizes(), w_hr.has_value(), w_hh_reverse.has_value(),
                 options.batch_sizes, instance);
  layer.end_at(options.lengths);
  layer.shape.train = train;
  layer.shape.deterministic = deterministic;
  layer.without_input_weights(w_ih.has_value(), w_ih_reverse.has_value());
  layer.regularise(options);
  layer.replace_at(options.resets);
  options.reset_h = layer.checked_reset(options.reset_h, "reset_h", layer.shape.P);
  FUSED_RNN_CHECK(layer.cell.has_c || !options.reset_c, "only the LSTM has reset_c");
  options.reset_c = layer.checked_reset(options.reset_c, "reset_c", layer.shape.H);
  layer.choose_products(precision, true);
  const LayerShape& s = layer.shape;
  const int64_t D = s.directions;
  x = layer.checked_sequence(x, "x", s.I);
  h0 = layer.checked_state(h0, "h0", s.P);
  std::vector<Weights> weights{layer.checked_weights(w_ih, w_hh, b_ih, b_hh, w_hr)};
  if (D == 2) {
    weights.push_back(layer.checked_weights(w_ih_reverse, *w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse));
  }

  const ForwardDirection first = inputs_of_forward(x, weights[0]);
  cpu::reconsider_products(layer.shape, first.x, first.w_ih);

  const Tensor y = layer.new_sequence(D * s.P);
  const Tensor h_n = layer.step ? empty({0}, layer.dtype) : layer.new_state(s.P);
  const Tensor c_n = layer.first_c(c0);
  FUSED_RNN_CHECK(!want_c_sequence || layer.cell.has_c, "only the LSTM has c");
  const Tensor c_sequence = want_c_sequence ? layer.new_sequence(D * s.H) : empty({0}, layer.dtype);
  const Tensor reserve = layer.new_reserve(train ? D : 0);
  const int64_t workspace = whole_lines(layer.kernels.forward_workspace(s));
  const Scratch scratch(D * workspace * layer.element());

  layer.clear_absent(y, D * s.P);
  if (want_c_sequence) layer.clear_absent(c_sequence, D * s.H);
  if (!layer.step) layer.pass_on(h0, h_n);
  if (s.N > 0 && s.P > 0) {
    ForwardParams params{s, {}};
    for (int64_t d = 0; d < D; ++d) {
      ForwardDirection& p = params.direction[d] = inputs_of_forward(x, weights[d]);
      if (s.gates_given) p.x = layer.offset(x, d * layer.cell.gates * s.H);
      p.variant = layer.variant(options, d);
      p.h0 = h0 ? layer.offset(*h0, d * layer.B * s.P) : nullptr;
      p.reset = layer.reset_state(options.reset_h, options.reset_c, d);
      p.reserve = train ? layer.reserve(reserve.data_ptr(), d) : Reserve{};
      p.y = layer.offset(y, d * s.P);
      p.y_stride = D * s.P;
      p.c_sequence = want_c_sequence ? layer.offset(c_sequence, d * s.H) : nullptr;
      p.h_n = layer.step ? nullptr : layer.offset(h_n, d * layer.B * s.P);
      p.c = layer.cell.has_c ? layer.offset(c_n, d * layer.B * s.H) : nullptr;
      p.workspace = scratch.data() + d * workspace * layer.element();
    }
    cpu::forward(layer.kernels, params, threads());
  }
  const ScalarType out = layer.stored;
  return {converted(y, out), converted(h_n, out), converted(c_n, out), reserve, converted(c_sequence, out)};
}

// One step in inference: h and c of [B, ...]. forward's T == 1, short of all that a step has no need of.
std::tuple<Tensor, Tensor> step(Tensor x, OptionalTensor h0, OptionalTensor c0, int64_t cell, Tensor w_ih, Tensor w_hh,
                                OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr, bool deterministic) {
  FUSED_RNN_CHECK(x.dim() == 2, "x must be [B, I], got ", shape_text(x.sizes()));
  CpuLayer layer(cell, x.sizes(), x.scalar_type(), w_hh.sizes(), w_hr.has_value(), false, std::nullopt);
  layer.shape.deterministic = deterministic;
  layer.choose_products(0, true);
  const LayerShape& s = layer.shape;
  x = layer.checked_sequence(x, "x", s.I);
  h0 = layer.checked_state(h0, "h0", s.P);
  const Weights w = layer.checked_weights(w_ih, w_hh, b_ih, b_hh, w_hr);
  const Tensor h = layer.new_state(s.P);
  const Tensor c = layer.first_c(c0);
  const Scratch scratch(layer.kernels.forward_workspace(s) * layer.element());
  if (s.N > 0 && s.P > 0) {
    ForwardParams params{s, {}};
    ForwardDirection& p = params.direction[0] = inputs_of_forward(x, w);
    p.h0 = data(h0);
    p.y = h.data_ptr();
    p.y_stride = s.P;
    p.c = layer.cell.has_c ? c.data_ptr() : nullptr;
    p.workspace = scratch.data();
    cpu::forward(layer.kernels, params, threads());
  }
  return {converted(h, layer.stored), converted(c, layer.stored)};
}

Gradients backward(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n, Tensor x, Tensor reserve, int64_t cell,
                   bool need_dx, bool need_dstate, bool need_dw_ih, bool need_dw_hh, bool need_db, bool need_dw_hr,
                   OptionalTensor w_ih, Tensor w_hh, OptionalTensor w_hr, OptionalTensor w_ih_reverse,
                   OptionalTensor w_hh_reverse, OptionalTensor w_hr_reverse, GivenOptions given, int64_t reset_steps,
                   OptionalTensor dc_sequence, bool deterministic, bool, int64_t precision, int64_t instance) {
  Options options(given);
  CpuLayer layer(cell, x.sizes(), x.scalar_type(), w_hh.sizes(), w_hr.has_value(), w_hh_reverse.has_value(),
                 options.batch_sizes, instance);
  layer.end_at(options.lengths);
  layer.shape.deterministic = deterministic;
  layer.without_input_weights(w_ih.has_value(), w_ih_reverse.has_value());
  layer.regularise(options);
  FUSED_RNN_CHECK(w_ih || !need_dw_ih, "without w_ih there is no dw_ih");
  layer.replace_at(options.resets);
  layer.choose_products(precision, false);
  const LayerShape& s = layer.shape;
  const int64_t D = s.directions;
  if (need_dw_ih) x = layer.checked_sequence(x, "x", s.I);
  if (dy) dy = layer.checked_sequence(*dy, "dy", D * s.P);
  FUSED_RNN_CHECK(!layer.step || !dh_n, "a single step has no dh_n");
  dh_n = layer.checked_state(dh_n, "dh_n", s.P);
  FUSED_RNN_CHECK(layer.cell.has_c || !(dc_n || dc_sequence), "only the LSTM has dc_n and dc_sequence");
  if (dc_sequence) dc_sequence = layer.checked_sequence(*dc_sequence, "dc_sequence", D * s.H);
  dc_n = layer.checked_state(dc_n, "dc_n", s.H);
  reserve = checked(reserve, "reserve", {D, layer.reserve_rows(), layer.reserve_width()}, layer.dtype);
  std::vector<Weights> weights{layer.checked_weights(w_ih, w_hh, std::nullopt, std::nullopt, w_hr)};
  if (D == 2) {
    weights.push_back(layer.checked_weights(w_ih_reverse, *w_hh_reverse, std::nullopt, std::nullopt, w_hr_reverse));
  }

  const auto none = [] { return Tensor(); };  // None in Python
  Tensor dx = need_dx ? layer.new_sequence(s.I) : none();
  Tensor dh0 = need_dstate ? layer.new_state(s.P) : none();
  Tensor dc = layer.cell.has_c ? layer.new_state(s.H) : none();
  if (layer.cell.has_c) layer.copy_or_zeros(dc_n, dc);
  if (need_dx) layer.clear_absent(dx, s.I);
  if (need_dstate) layer.pass_on(dh_n, dh0);
  FUSED_RNN_CHECK(reset_steps == 0 || (options.resets && (reset_steps == 1 || reset_steps == -1)),
                  "reset_steps must be 0, 1 or, for one state for each step, -1, got ", reset_steps);
  const auto new_reset = [&](int64_t width) {
    if (reset_steps == 0 || width == 0) return none();
    const Tensor sums =
        reset_steps == 1 ? empty({D, layer.B, width}, layer.dtype) : empty({layer.T, D, layer.B, width}, layer.dtype);
    return layer.copy_or_zeros(std::nullopt, sums);
  };
  const Tensor dreset_h = new_reset(s.P), dreset_c = new_reset(layer.cell.has_c ? s.H : 0);
  const int64_t rows = layer.cell.gates * s.H;
  struct OfWeights {
    Tensor w_ih, w_hh, b_ih, b_hh, w_hr;
  };
  const auto of_weights = [&](bool present) -> OfWeights {
    return {present && need_dw_ih ? empty({rows, s.I}, layer.dtype) : none(),
            present && need_dw_hh ? empty({rows, s.P}, layer.dtype) : none(),
            present && need_db ? empty({rows}, layer.dtype) : none(),
            present && need_db ? empty({rows}, layer.dtype) : none(),
            present && need_dw_hr && s.projected ? empty({s.P, s.H}, layer.dtype) : none()};
  };
  const OfWeights dw[2] = {of_weights(true), of_weights(D == 2)};

  const Tensor dnorm_hh = s.normalised ? empty({D, rows}, layer.dtype) : none();
  const Tensor dnorm_c = s.normalised && layer.cell.has_c ? empty({D, 2, s.H}, layer.dtype) : none();

  // Scratch: the workspaces of directions and of threads, for which the former's may serve again, gates' gradients,
  // gradients of h behind a projection, what layer normalisation needs, and what passes between chunks of steps.
  const LayerShape chunk = cpu::chunk_shape(s);
  const bool chunked = chunk.T < s.T;
  const int64_t workers = cpu::gradient_workers(chunk, threads());
  const int64_t workspace = whole_lines(layer.kernels.backward_workspace(chunk));
  const int64_t of_workers = workers * layer.kernels.gradients_workspace(chunk);
  const int64_t grads = chunk.N * layer.cell.grads * s.H, dh_total = s.projected ? chunk.N * s.P : 0;
  const int64_t dproduct = s.normalised ? chunk.N * rows : 0, dnormal = dnorm_c.defined() ? chunk.N * 2 * s.H : 0;
  const int64_t dh_chunk = chunked ? s.B * s.P : 0;
  const int64_t workspaces = whole_lines(chunked ? workspace + of_workers : std::max(D * workspace, of_workers));
  const Scratch scratch((workspaces + D * (grads + dh_total + dproduct + dnormal + dh_chunk)) * layer.element());
  char* next = scratch.data();
  const auto take = [&](int64_t elements) {
    char* taken = next;
    next += elements * layer.element();
    return taken;
  };

  char* const directions = take(workspaces);
  BackwardParams params{s, {}, false, need_dx ? dx.data_ptr() : nullptr, directions};
  if (chunked) params.workspace = directions + workspace * layer.element();
  for (int64_t d = 0; d < D; ++d) {
    BackwardDirection& p = params.direction[d];
    p.workspace = directions + d * workspace * layer.element();
    p.x = need_dw_ih ? x.data_ptr() : nullptr;
    p.w_ih = data(weights[d].w_ih);
    p.w_hh = data(weights[d].w_hh);
    p.w_hr = data(weights[d].w_hr);
    p.dy = dy ? layer.offset(*dy, d * s.P) : nullptr;
    p.dy_stride = D * s.P;
    p.dh_n = dh_n ? layer.offset(*dh_n, d * layer.B * s.P) : nullptr;
    p.variant = layer.variant(options, d);
    p.reserve = layer.reserve(reserve.data_ptr(), d);
    p.dgates = take(grads);
    p.dproduct = take(dproduct);
    p.dnormal = take(dnormal);
    p.dnorm_hh = s.normalised ? layer.offset(dnorm_hh, d * rows) : nullptr;
    p.dnorm_c = dnorm_c.defined() ? layer.offset(dnorm_c, d * 2 * s.H) : nullptr;
    p.dh_total = s.projected ? take(dh_total) : nullptr;
    p.dh_chunk = chunked ? take(dh_chunk) : nullptr;
    p.dh0 = need_dstate ? layer.offset(dh0, d * layer.B * s.P) : nullptr;
    p.dc = layer.cell.has_c ? layer.offset(dc, d * layer.B * s.H) : nullptr;
    p.dc_sequence = dc_sequence ? layer.offset(*dc_sequence, d * s.H) : nullptr;
    p.dreset = layer.reset_state(dreset_h, dreset_c, d);
    p.dw_ih = need_dw_ih ? dw[d].w_ih.data_ptr() : nullptr;
    p.dw_hh = need_dw_hh ? dw[d].w_hh.data_ptr() : nullptr;
    p.db_ih = need_db ? dw[d].b_ih.data_ptr() : nullptr;
    p.db_hh = need_db ? dw[d].b_hh.data_ptr() : nullptr;
    p.dw_hr = need_dw_hr && s.projected ? dw[d].w_hr.data_ptr() : nullptr;
  }
  cpu::backward(layer.kernels, params, threads(), workers);
  const auto& [w, r] = dw;
  const auto out = [&](const Tensor& t) {
    return layer.stored == layer.dtype || !t.defined() ? t : converted(t, layer.stored);
  };
  return {out(dx),       out(dh0),      out(need_dstate ? dc : none()),
          out(w.w_ih),   out(w.w_hh),   out(w.b_ih),
          out(w.b_hh),   out(w.w_hr),   out(r.w_ih),
          out(r.w_hh),   out(r.b_ih),   out(r.b_hh),
          out(r.w_hr),   out(dreset_h), out(dreset_c),
          out(dnorm_hh), out(dnorm_c)};
}

STABLE_TORCH_LIBRARY(fused_rnn, m) {
  m.def(kForwardSchema);
  m.def(kBackwardSchema);
  m.def(
      "step(Tensor x, Tensor? h0, Tensor? c0, int cell, Tensor w_ih, Tensor w_hh, Tensor? b_ih=None, "
      "Tensor? b_hh=None, Tensor? w_hr=None, bool deterministic=False) -> (Tensor h, Tensor c)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("step", TORCH_BOX(&step));
}

}  // namespace bindings
}  // namespace fused_rnn
