// The CUDA operators: a layer's recurrence, forward and backward, all directions at once. The products over all time
// steps around them (fused_rnn/cuda.py) are torch's own.
//
// They check everything that a kernel relies on, and take one of two ways: kernels that keep the recurrent weights on
// the chip for the whole sequence (`resident`; `instance` forces one of them, -1 leaves it to the planner), or one
// product and one pointwise kernel per step, which is the only way with layer normalisation. Built for the emulator,
// the same code registers itself for CPU tensors.
#include <torch/csrc/stable/library.h>

#include "cuda_layer.h"

namespace fused_rnn {
namespace bindings {

namespace {

using torch::stable::select;

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// y [T, B, D*H], h_n and c_n [D, B, H] (c_n empty without c), then what backward reads: h_prev [D, T, B, padded], saved
// [D, T, B, kSaved*H], state_prev [D, T, B, H], h_gates [D, T, B, G*H], statistics [D, T, B, 4]; those are empty
// without `train`, or where params.h says that there are none. Last c of every step, as y, if it is wanted.
Forward recurrence_forward(Tensor x_gates, OptionalTensor h0, OptionalTensor c0, int64_t cell, bool train,
                           bool resident, int64_t instance, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                           OptionalTensor lengths, OptionalTensor resets, OptionalTensor reset_h,
                           OptionalTensor reset_c, bool want_c_sequence, OptionalTensor drop_h, OptionalTensor zone_h,
                           OptionalTensor zone_c, OptionalTensor norm_hh, OptionalTensor norm_c,
                           OptionalTensor norm_c_bias, double norm_eps) {
  FUSED_RNN_CHECK(x_gates.dim() == 4 && w_hh.dim() == 3, "x_gates must be [D, T, B, G*H] and w_hh [D, G*H, H]");
  const int64_t G = cell_info(cell).gates;
  const Layer l(x_gates, cell, resident, x_gates.size(0), x_gates.size(1), x_gates.size(2), x_gates.size(3) / G,
                lengths);
  const int64_t D = l.D, T = l.T, B = l.B, H = l.H;
  l.given(x_gates, "x_gates", {D, T, B, G * H});
  l.given(w_hh, "w_hh", {D, G * H, l.padded});
  l.given(b_ih, "b_ih", {D, G * H});
  l.given(b_hh, "b_hh", {D, G * H});
  l.given(h0, "h0", {D, B, H});
  l.given(c0, "c0", {D, B, H});
  FUSED_RNN_CHECK(l.cell.has_c || !(c0 || reset_c || want_c_sequence), "only the LSTM has c");
  const int64_t S = reset_h && reset_h->dim() == 4 ? reset_h->size(1) : 1;
  FUSED_RNN_CHECK(S == 1 || S == T, "reset_h must be of 1 or ", T, " steps, got ", S);
  l.given(reset_h, "reset_h", {D, S, B, H});
  l.given(reset_c, "reset_c", {D, S, B, H});
  const uint8_t* const begins = checked_resets(l, resets);
  const Regularisation r{drop_h, zone_h, zone_c, norm_hh, norm_c, norm_c_bias, norm_eps};
  r.check(l);
  const Tensor c_sequence = want_c_sequence ? l.empty({T, B, D * H}) : l.empty({0});

  const bool has_c = l.cell.has_c, keeps_state = train && (has_c || (l.cell.uses_h && drop_h));
  const Tensor y = l.empty({T, B, D * H}), h_n = l.empty({D, B, H}), c_n = l.empty({has_c ? D : 0, B, H});
  const Tensor saved = l.empty({train ? D : 0, T, B, l.cell.saved * H});
  const Tensor state_prev = l.empty_arithmetic({keeps_state ? D : 0, T, B, H});
  const int64_t kept_norms = train && r.normalises() ? D : 0;
  const Tensor all_h_gates = l.empty({norm_hh ? kept_norms : 0, T, B, G * H});
  const Tensor statistics = l.empty_arithmetic({kept_norms, T, B, 4});
  if (resident) {
    w_hh = aligned(w_hh);
    const cuda::Plan plan = l.plan(false, instance);
    const bool exchanges = train || plan.instance.exchange == cuda::Exchange::kThroughL2;
    const Tensor h_prev = l.exchange(plan, {exchanges ? D : 0, T, B, l.padded});
    cuda::ForwardParams params{l.sequence(), {}};
    params.sequence.resets = begins;
    for (int64_t d = 0; d < D; ++d) {
      cuda::ForwardDirection& p = params.direction[d];
      p.x_gates = slice(x_gates, d), p.w_hh = slice(w_hh, d), p.b_ih = slice(b_ih, d), p.b_hh = slice(b_hh, d);
      p.h0 = slice(h0, d), p.c0 = slice(c0, d), p.h_n = slice(h_n, d), p.c_n = slice(c_n, d);
      p.y = slice(y, 0) + d * H * l.bytes(), p.y_stride = D * H;
      p.reset = reset_state(l, reset_h, reset_c, d);
      if (want_c_sequence) p.c_sequence = slice(c_sequence, 0) + d * H * l.bytes();
      p.drop_h = slice(drop_h, d), p.zone_h = r.zone(l, zone_h, d), p.zone_c = r.zone(l, zone_c, d);
      p.h_prev = slice(h_prev, d), p.saved = slice(saved, d);
      p.state_prev = reinterpret_cast<float*>(slice(state_prev, d));
    }
    cuda::recurrence(l.kind).forward(l.element(), plan, params, l.stream);
    return {y,           h_n,        c_n,       train ? h_prev : l.empty({0, T, B, l.padded}), saved, state_prev,
            all_h_gates, statistics, c_sequence};
  }

  // h_prev[d][T] is h_n's place; without `train` two slots take turns. With drop_h they hold what is multiplied, and h
  // itself lies elsewhere.
  const int64_t slots = train ? T + 1 : 2;
  const Tensor h = l.empty({D, slots, B, H}), h_gates = l.empty({B, G * H});
  const Tensor c = l.empty_arithmetic({has_c ? D : 0, B, H});
  if (has_c) copied(c0, c);
  const Tensor kept_h = l.empty_arithmetic({drop_h ? D : 0, B, H});
  if (drop_h) copied(h0, kept_h);
  const Tensor scratch = l.empty_arithmetic({norm_c ? B : 0, 2 * H});
  const Tensor unkept = l.empty_arithmetic({r.normalises() ? B : 0, 4});
  for (int64_t d = 0; d < D; ++d) {
    const Tensor h_d = select(h, 0, d), x_d = select(x_gates, 0, d),
                 y_d = torch::stable::narrow(const_cast<Tensor&>(y), 2, d * H, H);
    const Tensor w_t = torch::stable::transpose(select(w_hh, 0, d), 0, 1);
    const auto slot = [&](int64_t step) { return select(h_d, 0, !train ? step % 2 : d == 0 ? step : T - step); };
    if (h0 && drop_h) {
      into(slot(0), "aten::mul", select(*h0, 0, d), select(*drop_h, 0, d));
    } else {
      copied(h0 ? OptionalTensor(select(*h0, 0, d)) : std::nullopt, slot(0));
    }
    for (int64_t step = 0; step < T; ++step) {
      const int64_t t = d == 0 ? step : T - 1 - step, next = d == 0 ? t + 1 : t - 1;
      const Tensor from = slot(step), to = slot(step + 1), y_t = select(y_d, 0, t);
      const Tensor product = all_h_gates.numel() > 0 ? select(select(all_h_gates, 0, d), 0, t) : h_gates;
      into(product, "aten::mm", from, w_t);
      cuda::StepForwardParams p{};
      p.t = t, p.B = B, p.H = static_cast<int>(H), p.lengths = l.lengths;
      p.x_gates = slice(x_d, t), p.h_gates = product.data_ptr(), p.b_ih = slice(b_ih, d), p.b_hh = slice(b_hh, d);
      p.h_prev = from.data_ptr(), p.h = to.data_ptr(), p.kept_h = slice(kept_h, d), p.c = slice(c, d);
      p.drop_h = slice(drop_h, d), p.zone_h = r.zone(l, zone_h, d, t), p.zone_c = r.zone(l, zone_c, d, t);
      p.y = y_t.data_ptr(), p.y_stride = D * H;
      if (want_c_sequence) p.c_sequence = slice(c_sequence, t) + d * H * l.bytes();
      p.resets = between(l, begins, t, next);
      if (p.resets.at) p.reset = of_step(reset_state(l, reset_h, reset_c, d), l, next);
      if (train) {
        p.saved = slice(select(saved, 0, d), t);
        p.state_prev = keeps_state ? slice(select(state_prev, 0, d), t) : nullptr;
      }
      if (r.normalises()) {
        const Tensor of_step = kept_norms > 0 ? select(select(statistics, 0, d), 0, t) : unkept;
        cuda::recurrence(l.kind).normalised_forward(l.stored_type(), {p, r.norms(d, of_step), slice(scratch, 0)},
                                                    l.stream);
      } else {
        cuda::recurrence(l.kind).step_forward(l.stored_type(), p, l.stream);
      }
    }
    Tensor last = select(h_n, 0, d);
    torch::stable::copy_(last, drop_h ? select(kept_h, 0, d) : slot(T));
  }
  if (has_c) {
    Tensor out = c_n;
    torch::stable::copy_(out, c);
  }
  return {y, h_n, c_n, train ? h : l.empty({0, T, B, H}), saved, state_prev, all_h_gates, statistics, c_sequence};
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// dgates [D, T, B, kGrads*padded], dh0 and dc0 [D, B, H] (dc0 empty without c), gradients of reset_h and reset_c
// [D, T, B, H]; and with normalisation those of its input dh_gates [D, T, B, G*H], and each batch row's part of
// norm_hh's [D, B, G*H] and of norm_c's and norm_c_bias's [D, B, 2*H]. What is not there or not wanted is empty.
Backward recurrence_backward(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n, Tensor h_prev, Tensor saved,
                             Tensor state_prev, Tensor h_gates, Tensor statistics, int64_t cell, bool resident,
                             int64_t instance, Tensor w_hh_t, OptionalTensor lengths, OptionalTensor resets,
                             bool need_dreset, OptionalTensor dc_sequence, OptionalTensor drop_h, OptionalTensor zone_h,
                             OptionalTensor zone_c, OptionalTensor norm_hh, OptionalTensor norm_c,
                             OptionalTensor norm_c_bias) {
  FUSED_RNN_CHECK(saved.dim() == 4 && w_hh_t.dim() == 3, "saved must be [D, T, B, S*H] and w_hh_t [D, H, G*H]");
  const CellInfo info = cell_info(cell);
  const Layer l(saved, cell, resident, saved.size(0), saved.size(1), saved.size(2), saved.size(3) / info.saved,
                lengths);
  const int64_t D = l.D, T = l.T, B = l.B, H = l.H, G = info.gates;
  l.given(saved, "saved", {D, T, B, info.saved * H});
  if (info.uses_h) l.given(h_prev, "h_prev", {D, resident ? T : T + 1, B, l.padded});
  const bool keeps_state = info.has_c || (info.uses_h && drop_h);
  if (keeps_state) l.given(state_prev, "state_prev", {D, T, B, H}, l.arithmetic());
  const Regularisation r{drop_h, zone_h, zone_c, norm_hh, norm_c, norm_c_bias, 0.0};
  r.check(l);
  if (norm_hh) l.given(h_gates, "h_gates", {D, T, B, G * H});
  if (r.normalises()) l.given(statistics, "statistics", {D, T, B, 4}, l.arithmetic());
  l.given(w_hh_t, "w_hh_t", {D, H, G * l.padded});
  l.given(dy, "dy", {T, B, D * H});
  l.given(dh_n, "dh_n", {D, B, H});
  l.given(dc_n, "dc_n", {D, B, H});
  l.given(dc_sequence, "dc_sequence", {T, B, D * H});
  FUSED_RNN_CHECK(info.has_c || !(dc_n || dc_sequence), "only the LSTM has c");
  const uint8_t* const begins = checked_resets(l, resets);
  FUSED_RNN_CHECK(begins || !need_dreset, "there are no resets");

  const bool has_dreset_c = need_dreset && info.has_c;
  const Tensor dreset_h = copied(std::nullopt, l.empty({need_dreset ? D : 0, T, B, H}));
  const Tensor dreset_c = copied(std::nullopt, l.empty({has_dreset_c ? D : 0, T, B, H}));
  const Tensor dh0 = l.empty({D, B, H}), dc0 = l.empty({info.has_c ? D : 0, B, H});
  const Tensor dh_gates = l.empty({norm_hh ? D : 0, T, B, G * H});
  const Tensor dnorm_hh = copied(std::nullopt, l.empty_arithmetic({norm_hh ? D : 0, B, G * H}));
  const Tensor dnorm_c = copied(std::nullopt, l.empty_arithmetic({norm_c ? D : 0, B, 2 * H}));
  if (resident) {
    w_hh_t = aligned(w_hh_t);
    const cuda::Plan plan = l.plan(true, instance);
    const Tensor dgates = l.exchange(plan, {D, T, B, info.grads * l.padded});
    cuda::BackwardParams params{l.sequence(), {}};
    params.sequence.resets = begins;
    for (int64_t d = 0; d < D; ++d) {
      cuda::BackwardDirection& p = params.direction[d];
      p.w_hh_t = slice(w_hh_t, d);
      p.h_prev = info.uses_h ? slice(h_prev, d) : nullptr;
      p.saved = slice(saved, d);
      p.state_prev = keeps_state ? reinterpret_cast<const float*>(slice(state_prev, d)) : nullptr;
      p.drop_h = slice(drop_h, d), p.zone_h = r.zone(l, zone_h, d), p.zone_c = r.zone(l, zone_c, d);
      p.dy = dy ? slice(*dy, 0) + d * H * l.bytes() : nullptr;
      p.dy_stride = D * H;
      p.dh_n = slice(dh_n, d);
      p.dc_n = slice(dc_n, d);
      p.dgates = slice(dgates, d);
      p.dh0 = slice(dh0, d);
      p.dc0 = slice(dc0, d);
      p.dc_sequence = dc_sequence ? slice(*dc_sequence, 0) + d * H * l.bytes() : nullptr;
      p.dreset = {slice(dreset_h, d), slice(dreset_c, d), B * H};
    }
    cuda::recurrence(l.kind).backward(l.element(), plan, params, l.stream);
    return {dgates, dh0, dc0, dreset_h, dreset_c, dh_gates, dnorm_hh, dnorm_c};
  }

  const Tensor dgates = l.empty({D, T, B, info.grads * H});

  const Tensor dh = copied(dh_n, l.empty_arithmetic({D, B, H}));
  const Tensor dc = l.empty_arithmetic({info.has_c ? D : 0, B, H});
  if (info.has_c) copied(dc_n, dc);
  const Tensor product = l.empty({B, H});
  for (int64_t d = 0; d < D; ++d) {
    const Tensor dgates_d = select(dgates, 0, d), w = torch::stable::transpose(select(w_hh_t, 0, d), 0, 1);
    const auto hidden_grads = [&](int64_t t) {
      if (norm_hh) return select(select(dh_gates, 0, d), 0, t);
      Tensor all = select(dgates_d, 0, t);
      return torch::stable::narrow(all, 1, info.hidden_grads * H, G * H);
    };
    for (int64_t step = 0; step <= T; ++step) {
      const int64_t t = d == 0 ? T - 1 - step : step, after = d == 0 ? t + 1 : t - 1;
      if (step > 0) into(product, "aten::mm", hidden_grads(after), w);
      cuda::StepBackwardParams p{};
      p.B = B, p.H = static_cast<int>(H), p.dh = slice(dh, d), p.drop_h = slice(drop_h, d);
      p.product = step > 0 ? product.data_ptr() : nullptr;
      p.dc = slice(dc, d);
      if (step > 0) p.resets = between(l, begins, t, after);
      if (p.resets.at) p.dreset = of_step({slice(dreset_h, d), slice(dreset_c, d), B * H}, l, after);
      if (step == T) {
        p.dh0 = slice(dh0, d);
        cuda::recurrence(l.kind).step_backward(l.stored_type(), p, l.stream);
        break;
      }
      p.t = t, p.lengths = l.lengths;
      p.saved = slice(select(saved, 0, d), t);
      // The reverse direction's slots are one further: slot T holds h0.
      p.h_prev = info.uses_h ? slice(select(h_prev, 0, d), d == 0 ? t : t + 1) : nullptr;
      p.state_prev = keeps_state ? slice(select(state_prev, 0, d), t) : nullptr;
      p.zone_h = r.zone(l, zone_h, d, t), p.zone_c = r.zone(l, zone_c, d, t);
      p.dy = dy ? slice(*dy, t) + d * H * l.bytes() : nullptr;
      p.dy_stride = D * H;
      p.dc_sequence = dc_sequence ? slice(*dc_sequence, t) + d * H * l.bytes() : nullptr;
      p.dgates = slice(dgates_d, t);
      if (!r.normalises()) {
        cuda::recurrence(l.kind).step_backward(l.stored_type(), p, l.stream);
        continue;
      }
      cuda::NormalisedBackwardParams n{p,
                                       r.norms(d, select(select(statistics, 0, d), 0, t)),
                                       nullptr,
                                       nullptr,
                                       slice(dnorm_hh, d),
                                       slice(dnorm_c, d)};
      if (norm_hh) n.h_gates = slice(select(h_gates, 0, d), t), n.dh_gates = slice(select(dh_gates, 0, d), t);
      cuda::recurrence(l.kind).normalised_backward(l.stored_type(), n, l.stream);
    }
  }
  if (info.has_c) {
    Tensor out = dc0;
    torch::stable::copy_(out, dc);
  }
  return {dgates, dh0, dc0, dreset_h, dreset_c, dh_gates, dnorm_hh, dnorm_c};
}

}  // namespace

#if defined(FUSED_RNN_EMULATOR)
STABLE_TORCH_LIBRARY(fused_rnn_emulator, m) {
#else
STABLE_TORCH_LIBRARY_FRAGMENT(fused_rnn, m) {
#endif
  m.def(
      "recurrence_forward(Tensor x_gates, Tensor? h0, Tensor? c0, int cell, bool train, bool resident, int instance, "
      "Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? lengths=None, Tensor? resets=None, Tensor? reset_h=None, "
      "Tensor? reset_c=None, bool want_c_sequence=False, Tensor? drop_h=None, Tensor? zone_h=None, "
      "Tensor? zone_c=None, Tensor? norm_hh=None, Tensor? norm_c=None, Tensor? norm_c_bias=None, float norm_eps=0.) -> "
      "(Tensor y, Tensor h_n, Tensor c_n, Tensor h_prev, Tensor saved, Tensor state_prev, Tensor h_gates, "
      "Tensor statistics, Tensor c_sequence)");
  m.def(
      "recurrence_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor h_prev, Tensor saved, Tensor state_prev, "
      "Tensor h_gates, Tensor statistics, int cell, bool resident, int instance, Tensor w_hh_t, Tensor? lengths=None, "
      "Tensor? resets=None, bool need_dreset=False, Tensor? dc_sequence=None, Tensor? drop_h=None, "
      "Tensor? zone_h=None, Tensor? zone_c=None, Tensor? norm_hh=None, Tensor? norm_c=None, "
      "Tensor? norm_c_bias=None) -> (Tensor dgates, Tensor dh0, Tensor dc0, Tensor dreset_h, Tensor dreset_c, "
      "Tensor dh_gates, Tensor dnorm_hh, Tensor dnorm_c)");
}

#if defined(FUSED_RNN_EMULATOR)
STABLE_TORCH_LIBRARY_IMPL(fused_rnn_emulator, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CUDA, m) {
#endif
  m.impl("recurrence_forward", TORCH_BOX(&recurrence_forward));
  m.impl("recurrence_backward", TORCH_BOX(&recurrence_backward));
}

}  // namespace bindings
}  // namespace fused_rnn
