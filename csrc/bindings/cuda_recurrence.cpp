// Both ways of a layer's recurrence: parameters for the resident kernels, or the loop over time on the host.
#include "cuda_recurrence.h"

#include <algorithm>

namespace fused_rnn {
namespace bindings {

namespace {

// States [D, B, H] that come in at resets, or [T, D, B, H], of direction d; the same layout for their gradients.
cuda::ResetState reset_state(const CudaLayer& l, const OptionalTensor& h, const OptionalTensor& c, int64_t d) {
  const auto at = [&](const OptionalTensor& t) { return t && t->defined() ? l.offset(*t, d * l.B * l.H) : nullptr; };
  const auto of_steps = [](const OptionalTensor& t) { return t && t->defined() && t->dim() == 4; };
  return {at(h), at(c), of_steps(h) || of_steps(c) ? l.D * l.B * l.H : 0};
}
cuda::ResetState of_step(const CudaLayer& l, const cuda::ResetState& state, int64_t t) {
  const auto at = [&](void* p) { return p ? static_cast<char*>(p) + t * state.step * l.element() : nullptr; };
  return {at(state.h), at(state.c), 0};
}
// The border between two neighbouring steps; none where one of them is outside the sequence.
cuda::StepResets between(const CudaLayer& l, int64_t t, int64_t other) {
  if (!l.resets || other < 0 || other >= l.T || t < 0 || t >= l.T) return {nullptr, 0};
  const int64_t later = std::max(t, other);
  return {l.row_resets() + later * l.B, later};
}

// Zoneout [T, B, D*H], or [D*H] of all rows, of direction d, from time t on.
Zones zones(const CudaLayer& l, const Options& o, int64_t d, int64_t t = 0) {
  const auto zone = [&](const OptionalTensor& given) -> Zone {
    if (!given) return {nullptr, 0};
    const int64_t stride = given->dim() == 1 ? 0 : l.D * l.H;
    return {l.offset(*given, d * l.H + t * l.B * stride), stride};
  };
  return {zone(o.zone_h), zone(o.zone_c)};
}
cuda::StepNorms norms(const Options& o, int64_t d, void* statistics) {
  return {slice(o.norm_hh, d), slice(o.norm_c, d), slice(o.norm_c_bias, d), kNormEps, statistics};
}
// What blocks exchange through L2: no word of it has been published, where its words are waited for.
void make_unpublished(const CudaLayer& l, const cuda::Plan& plan, const Tensor& exchanged) {
  if (!cuda::through_l2(plan.instance.exchange)) return;
  cuda::fill_with_ones(exchanged.data_ptr(), exchanged.numel() * l.element(), l.stream);
}

// Direction d's columns of [T, B, D*H], from time t on.
char* columns(const CudaLayer& l, const OptionalTensor& sequence, int64_t d, int64_t t = 0) {
  return sequence && sequence->defined() ? l.offset(*sequence, (t * l.B * l.D + d) * l.H) : nullptr;
}

}  // namespace

// ---- Forward --------------------------------------------------------------------------------------------------------

void CudaForward::run() const { layer.resident ? run_resident() : run_steps(); }

void CudaForward::run_resident() const {
  const CudaLayer& l = layer;
  const int64_t D = l.D, T = l.T, B = l.B, H = l.H;
  const cuda::Plan plan = l.plan(false);
  const bool exchanges = cuda::through_l2(plan.instance.exchange), ring = !kept && exchanges && T > cuda::kRingSteps;
  const Tensor h_prev =
      kept ? kept->h_prev : l.new_tensor({exchanges ? D : 0, ring ? cuda::kRingSteps : T, B, l.padded_H});
  make_unpublished(l, plan, h_prev);
  cuda::ForwardParams params{l.sequence(), {}, ring ? cuda::kRingSteps - 1 : -1};
  for (int64_t d = 0; d < D; ++d) {
    const Direction& in = directions[d];
    cuda::ForwardDirection& p = params.direction[d];
    p.x_gates = data(in.x_gates), p.w_hh = data(in.w_hh), p.b_ih = data(in.b_ih), p.b_hh = data(in.b_hh);
    p.h0 = data(in.h0), p.c0 = data(in.c0), p.h_n = slice(h_n, d), p.c_n = slice(c_n, d);
    p.y = columns(l, y, d), p.y_stride = D * H, p.c_sequence = columns(l, c_sequence, d);
    p.reset = reset_state(l, options.reset_h, options.reset_c, d);
    p.drop_h = slice(options.drop_h, d), p.zones = zones(l, options, d);
    p.h_prev = slice(h_prev, d);
    if (!kept) continue;
    const int64_t rows = d * T * B * H;
    p.saved = kept->saved + rows * l.cell.saved * l.element();
    if (kept->state_prev) p.state_prev = reinterpret_cast<float*>(kept->state_prev) + rows;
  }
  cuda::recurrence(l.cell.kind).forward(l.kernel_element(), plan, params, l.stream);
}

void CudaForward::run_steps() const {
  const CudaLayer& l = layer;
  const int64_t D = l.D, B = l.B, H = l.H;
  // Slot t holds h as step t multiplies it, slot t + 1 what the step makes of it; without backward two take turns. With
  // drop_h the slots hold the product, and h itself lies in kept_h.
  const Tensor h = kept ? kept->h_prev : l.new_tensor({D, 2, B, H});
  const Tensor c = empty({l.cell.has_c ? D : 0, B, H}, l.arithmetic(), l.place);
  const Tensor kept_h = empty({options.drop_h ? D : 0, B, H}, l.arithmetic(), l.place);
  for (int64_t d = 0; d < D; ++d) run_steps(d, h, c, kept_h);
  if (l.cell.has_c) copy(c, view(c_n, {D, B, H}));
}

void CudaForward::run_steps(int64_t d, const Tensor& h, const Tensor& c, const Tensor& kept_h) const {
  const CudaLayer& l = layer;
  const Options& o = options;
  const Direction& in = directions[d];
  const int64_t T = l.T, B = l.B, H = l.H, D = l.D;
  const Tensor slots = select(h, 0, d), w_t = transposed(in.w_hh), scratch_product = l.new_tensor({B, l.G * H});
  const Tensor scratch = empty({o.norm_c ? B : 0, 2 * H}, l.arithmetic(), l.place);
  const Tensor scratch_statistics = empty({l.normalises ? B : 0, 4}, l.arithmetic(), l.place);
  const auto slot = [&](int64_t step) { return select(slots, 0, !kept ? step % 2 : d == 0 ? step : T - step); };
  if (l.cell.has_c) filled(in.c0, select(c, 0, d));
  if (o.drop_h) filled(in.h0, select(kept_h, 0, d));
  if (in.h0 && o.drop_h) {
    into(slot(0), "aten::mul", *in.h0, select(*o.drop_h, 0, d));
  } else {
    filled(in.h0, slot(0));
  }
  for (int64_t step = 0; step < T; ++step) {
    const int64_t t = d == 0 ? step : T - 1 - step, next = d == 0 ? t + 1 : t - 1;
    const int64_t row = (d * T + t) * B;  // the step's first in what is kept
    const Tensor from = slot(step), to = slot(step + 1);
    const bool keeps_gates = kept && kept->h_gates.defined();
    const Tensor h_gates = keeps_gates ? select(select(kept->h_gates, 0, d), 0, t) : scratch_product;
    into(h_gates, "aten::mm", from, w_t);
    cuda::StepForwardParams p{};
    p.t = t, p.B = B, p.H = static_cast<int>(H), p.lengths = l.row_lengths();
    p.x_gates = slice(in.x_gates, t), p.h_gates = data(h_gates), p.b_ih = data(in.b_ih), p.b_hh = data(in.b_hh);
    p.h_prev = from.data_ptr(), p.h = to.data_ptr(), p.kept_h = slice(kept_h, d), p.c = slice(c, d);
    p.drop_h = slice(o.drop_h, d), p.zones = zones(l, o, d, t);
    p.y = columns(l, y, d, t), p.y_stride = D * H, p.c_sequence = columns(l, c_sequence, d, t);
    p.resets = between(l, t, next);
    if (p.resets.at) p.reset = of_step(l, reset_state(l, options.reset_h, options.reset_c, d), next);
    char* statistics = slice(scratch_statistics, 0);
    if (kept) {
      const int64_t number = element_size(l.arithmetic());
      p.saved = kept->saved + row * l.cell.saved * H * l.element();
      if (kept->state_prev) p.state_prev = kept->state_prev + row * H * number;
      if (kept->statistics) statistics = kept->statistics + row * 4 * number;
    }
    const cuda::Recurrence& kernels = cuda::recurrence(l.cell.kind);
    if (l.normalises) {
      kernels.normalised_forward(l.stored_type(), {p, norms(o, d, statistics), slice(scratch, 0)}, l.stream);
    } else {
      kernels.step_forward(l.stored_type(), p, l.stream);
    }
  }
  copy(o.drop_h ? select(kept_h, 0, d) : slot(T), select(view(h_n, {D, B, H}), 0, d));
}

// ---- Backward -------------------------------------------------------------------------------------------------------

void CudaBackward::run() const { layer.resident ? run_resident() : run_steps(); }

void CudaBackward::run_resident() const {
  const CudaLayer& l = layer;
  const int64_t D = l.D, T = l.T, B = l.B, H = l.H;
  const cuda::Plan plan = l.plan(true);
  make_unpublished(l, plan, dgates);
  cuda::BackwardParams params{l.sequence(), {}};
  for (int64_t d = 0; d < D; ++d) {
    const int64_t rows = d * T * B * H;
    cuda::BackwardDirection& p = params.direction[d];
    p.w_hh_t = data(w_hh[d]);
    p.h_prev = l.cell.uses_h ? slice(kept.h_prev, d) : nullptr;
    p.saved = kept.saved + rows * l.cell.saved * l.element();
    if (kept.state_prev) p.state_prev = reinterpret_cast<const float*>(kept.state_prev) + rows;
    p.drop_h = slice(options.drop_h, d), p.zones = zones(l, options, d);
    p.dy = columns(l, dy, d), p.dy_stride = D * H, p.dc_sequence = columns(l, dc_sequence, d);
    p.dh_n = slice(dh_n, d), p.dc_n = slice(dc_n, d), p.dh0 = slice(dh0, d), p.dc0 = slice(dc0, d);
    p.dgates = slice(dgates, d);
    p.dreset = reset_state(l, dreset_h, dreset_c, d);
  }
  cuda::recurrence(l.cell.kind).backward(l.kernel_element(), plan, params, l.stream);
}

void CudaBackward::run_steps() const {
  const CudaLayer& l = layer;
  const Tensor dh = filled(dh_n, empty({l.D, l.B, l.H}, l.arithmetic(), l.place));
  const Tensor dc = empty({l.cell.has_c ? l.D : 0, l.B, l.H}, l.arithmetic(), l.place);
  if (l.cell.has_c) filled(dc_n, dc);
  for (int64_t d = 0; d < l.D; ++d) run_steps(d, dh, dc);
  if (l.cell.has_c) copy(dc, view(dc0, {l.D, l.B, l.H}));
}

void CudaBackward::run_steps(int64_t d, const Tensor& dh, const Tensor& dc) const {
  const CudaLayer& l = layer;
  const Options& o = options;
  const int64_t T = l.T, B = l.B, H = l.H, D = l.D, G = l.G, hidden_grads = l.cell.hidden_grads;
  const int64_t number = element_size(l.arithmetic());
  const Tensor product = l.new_tensor({B, H}), dgates_d = select(dgates, 0, d);
  const auto of_hidden = [&](int64_t t) {
    return o.norm_hh ? select(select(dh_gates, 0, d), 0, t)
                     : narrow(select(dgates_d, 0, t), 1, hidden_grads * H, G * H);
  };
  const cuda::Recurrence& kernels = cuda::recurrence(l.cell.kind);
  for (int64_t step = 0; step <= T; ++step) {
    const int64_t t = d == 0 ? T - 1 - step : step, after = d == 0 ? t + 1 : t - 1;
    const int64_t row = (d * T + t) * B;
    if (step > 0) into(product, "aten::mm", of_hidden(after), w_hh[d]);
    cuda::StepBackwardParams p{};
    p.B = B, p.H = static_cast<int>(H), p.dh = slice(dh, d), p.drop_h = slice(o.drop_h, d);
    p.product = step > 0 ? product.data_ptr() : nullptr;
    p.dc = slice(dc, d);
    if (step > 0) p.resets = between(l, t, after);
    if (p.resets.at) p.dreset = of_step(l, reset_state(l, dreset_h, dreset_c, d), after);
    if (step == T) {
      p.dh0 = slice(dh0, d);
      kernels.step_backward(l.stored_type(), p, l.stream);
      break;
    }
    p.t = t, p.lengths = l.row_lengths();
    p.saved = kept.saved + row * l.cell.saved * H * l.element();
    // The reverse direction's slots are one further: slot T holds h0.
    if (l.cell.uses_h) p.h_prev = l.offset(kept.h_prev, ((d * (T + 1) + (d == 0 ? t : t + 1)) * B) * H);
    if (kept.state_prev) p.state_prev = kept.state_prev + row * H * number;
    p.zones = zones(l, o, d, t);
    p.dy = columns(l, dy, d, t), p.dy_stride = D * H, p.dc_sequence = columns(l, dc_sequence, d, t);
    p.dgates = slice(dgates_d, t);
    if (!l.normalises) {
      kernels.step_backward(l.stored_type(), p, l.stream);
      continue;
    }
    cuda::NormalisedBackwardParams n{
        p, norms(o, d, kept.statistics + row * 4 * number), nullptr, nullptr, slice(dnorm_hh, d), slice(dnorm_c, d)};
    if (o.norm_hh) {
      n.h_gates = l.offset(kept.h_gates, row * G * H), n.dh_gates = l.offset(dh_gates, row * G * H);
    }
    kernels.normalised_backward(l.stored_type(), n, l.stream);
  }
}

}  // namespace bindings
}  // namespace fused_rnn
