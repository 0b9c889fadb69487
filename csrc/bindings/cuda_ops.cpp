// The operators of a CUDA layer: as those of the CPU (ops.cpp), of which they have the schemas, the checks and the
// results.
//
// Forward:  x_gates = x W_ih^T of all time steps  ->  recurrence  ->  y.
// Backward: recurrence in reverse  ->  the gates' gradients  ->  one product each for dx, dW_ih and dW_hh, sums for the
// biases. Products and sums over all time steps are torch's own, so they are parallel over everything; the recurrence
// is cuda_recurrence.h's. Nothing waits for the GPU. Built for the emulator, the same code registers itself for CPU
// tensors.
#include <torch/csrc/stable/library.h>

#include "cuda_recurrence.h"
#include "cuda_weights.h"

namespace fused_rnn {
namespace bindings {

namespace {

// h0 or c0 of each direction, [B, H] as its first step consumes it: rows that begin anew at step 0 (`begins`,
// CudaLayer's begin_anew) take the state that comes in at resets. In the reverse direction step 0 is the last.
std::vector<OptionalTensor> entered(const CudaLayer& l, const OptionalTensor& begins, const OptionalTensor& state,
                                    const OptionalTensor& fresh) {
  std::vector<OptionalTensor> states(l.D);
  if (state) {
    for (int64_t d = 0; d < l.D; ++d) states[d] = select(view(*state, {l.D, l.B, l.H}), 0, d);
  }
  if (!begins || !(state || fresh)) return states;
  const Tensor zero = zero_like(state ? *state : *fresh);
  const Tensor first = !fresh ? zero : select(fresh->dim() == 4 ? select(*fresh, 0, 0) : *fresh, 0, 0);
  states[0] = where(*begins, first, state ? *states[0] : zero);
  return states;
}
// Backward of `entered`: dstate [D, B, H] keeps what goes to the initial state, dfresh [T, D, B, H] takes the rest.
void leave(const OptionalTensor& begins, const Tensor& dstate, const Tensor& dfresh) {
  if (!begins) return;
  const Tensor of_first = select(dstate, 0, 0), zero = zero_like(dstate);
  if (dfresh.defined()) copy(where(*begins, of_first, zero), select(select(dfresh, 0, 0), 0, 0));
  copy(where(*begins, zero, of_first), of_first);
}

void require_one_kind(const OptionalTensor& reset_h, const OptionalTensor& reset_c) {
  FUSED_RNN_CHECK(!reset_h || !reset_c || reset_h->dim() == reset_c->dim(),
                  "reset_h and reset_c must both be of all steps or of each");
}

Results forward(Tensor x, OptionalTensor h0, OptionalTensor c0, int64_t cell, bool train, OptionalTensor w_ih,
                Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr, OptionalTensor w_ih_reverse,
                OptionalTensor w_hh_reverse, OptionalTensor b_ih_reverse, OptionalTensor b_hh_reverse,
                OptionalTensor w_hr_reverse, GivenOptions given, bool want_c_sequence, bool, bool tf32,
                int64_t instance) {
  Options options(given);
  CudaLayer l(cell, x, w_ih, w_hh, w_hr, w_ih_reverse, w_hh_reverse, options);
  l.regularise(options);
  l.choose(tf32, instance);
  const int64_t D = l.D, T = l.T, B = l.B, H = l.H, G = l.G;
  const bool has_c = l.cell.has_c;
  FUSED_RNN_CHECK(has_c || !(c0 || options.reset_c || want_c_sequence), "only the LSTM has c");
  options.reset_h = l.checked_reset(options.reset_h, "reset_h", H);
  options.reset_c = l.checked_reset(options.reset_c, "reset_c", H);
  require_one_kind(options.reset_h, options.reset_c);
  h0 = l.checked_state(h0, "h0", H);
  c0 = l.checked_state(c0, "c0", H);
  std::vector<Weights> weights{l.checked_weights(w_ih, w_hh, b_ih, b_hh, w_hr)};
  if (D == 2) {
    weights.push_back(l.checked_weights(w_ih_reverse, *w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse));
  }
  x = l.padded(l.checked_sequence(x, "x", l.shape.I));

  CudaForward f{l, options, {}};
  f.y = l.new_padded(D * H), f.h_n = l.new_state(H);
  if (has_c) f.c_n = l.new_state(H);
  if (want_c_sequence) f.c_sequence = l.new_padded(D * H);
  const CudaReserve layout(l, options);
  const Tensor reserve = empty({train ? layout.bytes() : 0}, ScalarType::Byte, l.place);
  if (train) f.kept = layout.parts(reserve);
  const OptionalTensor begins = l.begin_anew();
  const std::vector<OptionalTensor> h = entered(l, begins, h0, options.reset_h),
                                    c = entered(l, begins, c0, options.reset_c);
  const Tensor rows = view(x, {T * B, l.shape.I});
  for (int64_t d = 0; d < D; ++d) {
    const Weights& w = weights[d];
    const Tensor x_gates =
        w.w_ih ? product(rows, transposed(*w.w_ih)) : torch::stable::contiguous(narrow(rows, 1, d * G * H, G * H));
    const Tensor of_h = with_padded_columns(l, w.w_hh);
    f.directions.push_back(
        {view(x_gates, {T, B, G * H}), l.resident ? aligned(of_h) : of_h, w.b_ih, w.b_hh, h[d], c[d]});
  }
  f.run();

  const auto none = [&] { return l.new_tensor({0}); };
  return {l.unpadded(f.y), l.step ? none() : f.h_n, has_c ? f.c_n : none(), reserve,
          want_c_sequence ? l.unpadded(f.c_sequence) : none()};
}

// What backward multiplies after the recurrence: gradients of x and of the weights, from those of the gates.
class Products {
 public:
  Products(const CudaLayer& l, const CudaBackward& b)
      : l_(l), b_(b), of_input_(l, l.cell.input_shift), of_hidden_(l, 0), width_(l.G * l.width()) {}

  Tensor dx(const std::vector<Weights>& weights) const {
    const int64_t N = l_.T * l_.B, I = l_.shape.I, D = l_.D;
    const Tensor out = l_.new_padded(I);
    if (l_.shape.gates_given) {
      const Tensor gates = view(out, {N, D, l_.G, l_.H});
      for (int64_t d = 0; d < D; ++d) of_input_.restore_columns(input_gates(d), select(gates, 1, d));
      return out;
    }
    const Tensor each = D == 1 ? out : l_.new_tensor({D, l_.T, l_.B, I});
    const Tensor rows = view(each, {D, N, I});
    for (int64_t d = 0; d < D; ++d) {
      into(select(rows, 0, d), "aten::mm", input_gates(d), of_input_.arranged(*weights[d].w_ih));
    }
    return D == 1 ? out : sum(each, 0);
  }
  Tensor dw_ih(int64_t d, const Tensor& x) const {
    return of_input_.restored(product(transposed(input_gates(d)), view(x, {l_.T * l_.B, l_.shape.I})));
  }
  Tensor dw_hh(int64_t d) const {
    const int64_t N = l_.T * l_.B;
    const Tensor of_product =
        b_.dh_gates.defined() ? view(select(b_.dh_gates, 0, d), {N, l_.G * l_.H}) : hidden_gates(d);
    // Where steps are products of their own, the reverse direction's states begin one slot further.
    const Tensor slots = select(b_.kept.h_prev, 0, d);
    const Tensor h = view(narrow(slots, 0, d * (slots.size(0) - l_.T), l_.T), {N, l_.width()});
    const Tensor all = of_hidden_.restored(product(transposed(of_product), h));
    return l_.width() == l_.H ? all : torch::stable::contiguous(narrow(all, 1, 0, l_.H));
  }
  Tensor db_ih(int64_t d) const { return of_input_.restored(sum(input_gates(d), 0)); }
  Tensor db_hh(int64_t d) const { return of_hidden_.restored(sum(hidden_gates(d), 0)); }

 private:
  // Of all rows: the first and the last blocks of a direction's gradients.
  Tensor input_gates(int64_t d) const { return narrow(all_gates(d), 1, 0, width_); }
  Tensor hidden_gates(int64_t d) const { return narrow(all_gates(d), 1, l_.cell.grads * l_.width() - width_, width_); }
  Tensor all_gates(int64_t d) const { return view(select(b_.dgates, 0, d), {l_.T * l_.B, l_.cell.grads * l_.width()}); }

  const CudaLayer& l_;
  const CudaBackward& b_;
  GateOrder of_input_, of_hidden_;
  int64_t width_;
};

Gradients backward(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n, Tensor x, Tensor reserve, int64_t cell,
                   bool need_dx, bool need_dstate, bool need_dw_ih, bool need_dw_hh, bool need_db, bool,
                   OptionalTensor w_ih, Tensor w_hh, OptionalTensor w_hr, OptionalTensor w_ih_reverse,
                   OptionalTensor w_hh_reverse, OptionalTensor w_hr_reverse, GivenOptions given, int64_t reset_steps,
                   OptionalTensor dc_sequence, bool tf32, int64_t instance) {
  Options options(given);
  CudaLayer l(cell, x, w_ih, w_hh, w_hr, w_ih_reverse, w_hh_reverse, options);
  l.regularise(options);
  l.choose(tf32, instance);
  const int64_t D = l.D, T = l.T, B = l.B, H = l.H, G = l.G;
  const bool has_c = l.cell.has_c;
  FUSED_RNN_CHECK(w_ih || !need_dw_ih, "without w_ih there is no dw_ih");
  FUSED_RNN_CHECK(!l.step || !dh_n, "a single step has no dh_n");
  FUSED_RNN_CHECK(has_c || !(dc_n || dc_sequence), "only the LSTM has dc_n and dc_sequence");
  FUSED_RNN_CHECK(reset_steps == 0 || (l.resets && (reset_steps == 1 || reset_steps == -1)),
                  "reset_steps must be 0, 1 or, for one state for each step, -1, got ", reset_steps);
  const CudaReserve layout(l, options);
  reserve = checked(reserve, "reserve", {layout.bytes()}, ScalarType::Byte, l.place);
  if (need_dw_ih) x = l.padded(l.checked_sequence(x, "x", l.shape.I));
  if (dy) dy = l.padded(l.checked_sequence(*dy, "dy", D * H));
  if (dc_sequence) dc_sequence = l.padded(l.checked_sequence(*dc_sequence, "dc_sequence", D * H));
  dh_n = l.checked_state(dh_n, "dh_n", H);
  dc_n = l.checked_state(dc_n, "dc_n", H);
  if (dc_n) dc_n = view(*dc_n, {D, B, H});
  std::vector<Weights> weights{l.checked_weights(w_ih, w_hh, std::nullopt, std::nullopt, w_hr)};
  if (D == 2) {
    weights.push_back(l.checked_weights(w_ih_reverse, *w_hh_reverse, std::nullopt, std::nullopt, w_hr_reverse));
  }

  CudaBackward b{l, options, layout.parts(reserve), {}, dy, dc_sequence, dh_n, dc_n};
  const GateOrder order(l, 0);
  for (const Weights& w : weights) {
    b.w_hh.push_back(l.resident ? torch::stable::contiguous(transposed(order.arranged(w.w_hh))) : w.w_hh);
  }
  b.dgates = l.new_tensor({D, T, B, l.cell.grads * l.width()});
  b.dh0 = l.new_state(H);
  if (has_c) b.dc0 = l.new_state(H);
  if (reset_steps != 0) b.dreset_h = cleared(l.new_tensor({T, D, B, H}));
  if (reset_steps != 0 && has_c) b.dreset_c = cleared(l.new_tensor({T, D, B, H}));
  if (options.norm_hh) {
    b.dh_gates = l.new_tensor({D, T, B, G * H});
    b.dnorm_hh = cleared(empty({D, B, G * H}, l.arithmetic(), l.place));
  }
  if (options.norm_c) b.dnorm_c = cleared(empty({D, B, 2, H}, l.arithmetic(), l.place));
  b.run();
  const OptionalTensor begins = l.begin_anew();
  leave(begins, b.dh0, b.dreset_h);
  if (has_c) leave(begins, b.dc0, b.dreset_c);

  const Products products(l, b);
  const auto none = [] { return Tensor(); };  // None in Python
  const auto of_resets = [&](const Tensor& of_steps) {
    return of_steps.defined() && reset_steps == 1 ? sum(of_steps, 0) : of_steps;
  };
  const auto of_rows = [&](const Tensor& parts) { return converted(sum(parts, 1), l.dtype); };
  const auto of_weights = [&](int64_t d, bool need, const auto& gradient) {
    return need && d < D ? gradient() : none();
  };
  const auto dw_ih = [&](int64_t d) { return of_weights(d, need_dw_ih, [&] { return products.dw_ih(d, x); }); };
  const auto dw_hh = [&](int64_t d) { return of_weights(d, need_dw_hh, [&] { return products.dw_hh(d); }); };
  const auto db_ih = [&](int64_t d) { return of_weights(d, need_db, [&] { return products.db_ih(d); }); };
  const auto db_hh = [&](int64_t d) { return of_weights(d, need_db, [&] { return products.db_hh(d); }); };
  return {need_dx ? l.unpadded(products.dx(weights)) : none(),
          need_dstate ? b.dh0 : none(),
          need_dstate ? b.dc0 : none(),
          dw_ih(0),
          dw_hh(0),
          db_ih(0),
          db_hh(0),
          none(),
          dw_ih(1),
          dw_hh(1),
          db_ih(1),
          db_hh(1),
          none(),
          of_resets(b.dreset_h),
          of_resets(b.dreset_c),
          options.norm_hh ? of_rows(b.dnorm_hh) : none(),
          options.norm_c ? of_rows(b.dnorm_c) : none()};
}

}  // namespace

#if defined(FUSED_RNN_EMULATOR)
STABLE_TORCH_LIBRARY(fused_rnn_emulator, m) {
  m.def(kForwardSchema);
  m.def(kBackwardSchema);
}
STABLE_TORCH_LIBRARY_IMPL(fused_rnn_emulator, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CUDA, m) {
#endif
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}

}  // namespace bindings
}  // namespace fused_rnn
