// The CUDA operators: a layer's recurrence, forward and backward, all directions at once. The products over all time
// steps around them (fused_rnn/cuda.py) are torch's own.
//
// They check everything that a kernel relies on, and take one of two ways: kernels that keep the recurrent weights on
// the chip for the whole sequence (`resident`; `instance` forces one of them, -1 leaves it to the planner), or one
// product and one pointwise kernel per step. Built for the emulator, the same
// code registers itself for CPU tensors.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>

#include "../cells/cells.h"
#include "../cuda/recurrence.h"
#include "tensors.h"

#if !defined(FUSED_RNN_EMULATOR)
#include <dlfcn.h>
#endif

namespace fused_rnn {
namespace bindings {

namespace {

using torch::stable::new_empty;
using torch::stable::select;

constexpr uint64_t kPatience = 10'000'000'000;  // nanoseconds: no step of any layer takes that long

struct CellInfo {
  int64_t gates, saved, grads, hidden_grads;
  bool has_c, uses_h;
};

CellInfo cell_info(int64_t cell) {
  switch (cell) {
#define FUSED_RNN_INFO(kind, policy, label)  \
  case static_cast<int64_t>(CellKind::kind): \
    return {policy::kGates, policy::kSaved, policy::kGrads, policy::kHiddenGrads, policy::kHasC, policy::kUsesH};
    FUSED_RNN_CELLS(FUSED_RNN_INFO)
#undef FUSED_RNN_INFO
  }
  fail("unknown cell ", cell);
}

void* current_stream([[maybe_unused]] int32_t device) {
#if defined(FUSED_RNN_EMULATOR)
  return nullptr;
#else
  // Looked up by name: this library must load under a torch without CUDA, too.
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  FUSED_RNN_CHECK(get && get(device, &stream) == AOTI_TORCH_SUCCESS, "found no CUDA stream in this torch");
  return stream;
#endif
}

// A layer's sizes and types, from tensors of checked shapes; its device is the current one while this lives.
class Layer {
 public:
  CellInfo cell;
  CellKind kind;
  ScalarType type;
  bool resident;  // the weights stay on the chip
  int64_t D, T, B, H, padded;
  const int32_t* lengths = nullptr;
  void* stream;

  // gates: [D, T, B, blocks * width], where width is H or, of what blocks exchange, H padded.
  Layer(const Tensor& like, int64_t cell_number, bool resident_, int64_t D_, int64_t T_, int64_t B_, int64_t H_,
        const OptionalTensor& lengths_)
      : cell(cell_info(cell_number)),
        kind(static_cast<CellKind>(cell_number)),
        type(like.scalar_type()),
        resident(resident_),
        D(D_),
        T(T_),
        B(B_),
        H(H_),
        padded(resident_ ? cuda::padded(static_cast<int>(H_), element()) : H_),
        like_(like),
        guard_(on_device(like) ? std::optional<Guard>(like.get_device_index()) : std::nullopt) {
    FUSED_RNN_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
                        (type == ScalarType::Double && !resident),
                    resident ? "the resident kernels take float32, bfloat16 or float16"
                             : "the dtype must be float32, float64, bfloat16 or float16");
    FUSED_RNN_CHECK(D == 1 || D == 2, "expected 1 or 2 directions, got ", D);
    FUSED_RNN_CHECK(T > 0 && B > 0 && H > 0 && H < (1 << 24), "expected at least one step, row and unit, got ", T, ", ",
                    B, ", ", H);
    if (lengths_) {
      const Tensor& l = *lengths_;
      FUSED_RNN_CHECK(
          l.scalar_type() == ScalarType::Int && l.is_contiguous() && l.dim() == 1 && l.size(0) == B && same_device(l),
          "lengths must be int32 of shape [", B, "], contiguous, and on the device of the others");
      require_storage(l, "lengths", B);
      lengths = static_cast<const int32_t*>(l.data_ptr());
    }
    stream = current_stream(on_device(like) ? like.get_device_index() : 0);
    int32_t* const error = cuda::error_word();
    if (*error != 0) {
      *error = 0;
      fail("an earlier kernel waited for another block in vain and gave up; its results are NaN");
    }
  }

  cuda::Element element() const {
    return type == ScalarType::BFloat16 ? cuda::Element::kBf16
           : type == ScalarType::Half   ? cuda::Element::kFp16
                                        : cuda::Element::kTf32;
  }
  cuda::StoredType stored_type() const {
    return type == ScalarType::BFloat16 ? cuda::StoredType::kBf16
           : type == ScalarType::Half   ? cuda::StoredType::kFp16
           : type == ScalarType::Double ? cuda::StoredType::kFloat64
                                        : cuda::StoredType::kFloat32;
  }
  int64_t bytes() const { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }
  ScalarType arithmetic() const { return type == ScalarType::Double ? type : ScalarType::Float; }

  Tensor empty(std::initializer_list<int64_t> sizes) const { return new_empty(like_, sizes, type); }
  Tensor empty_arithmetic(std::initializer_list<int64_t> sizes) const { return new_empty(like_, sizes, arithmetic()); }
  // What blocks exchange: no word of it has been published, where its words are waited for.
  Tensor exchange(const cuda::Plan& plan, std::initializer_list<int64_t> sizes) const {
    Tensor tensor = empty(sizes);
    if (plan.instance.exchange == cuda::Exchange::kThroughL2) {
      cuda::fill_with_ones(tensor.data_ptr(), tensor.numel() * bytes(), stream);
    }
    return tensor;
  }

  const Tensor& given(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes,
                      std::optional<ScalarType> other_type = std::nullopt) const {
    const auto got = tensor.sizes();
    bool same = got.size() == sizes.size();
    size_t i = 0;
    for (int64_t size : sizes) same = same && got[i++] == size;
    FUSED_RNN_CHECK(same, name, " must have shape ", shape_text(sizes), ", got ", shape_text(got));
    FUSED_RNN_CHECK(tensor.scalar_type() == other_type.value_or(type), name, " must have the dtype of the others");
    FUSED_RNN_CHECK(same_device(tensor), name, " must be on the device of the others");
    FUSED_RNN_CHECK(tensor.is_contiguous(), name, " must be contiguous");
    require_storage(tensor, name, tensor.numel());
    return tensor;
  }
  const OptionalTensor& given(const OptionalTensor& tensor, const char* name,
                              std::initializer_list<int64_t> sizes) const {
    if (tensor) given(*tensor, name, sizes);
    return tensor;
  }

  cuda::Plan plan(bool backward, int64_t instance) const {
    FUSED_RNN_CHECK(instance >= -1 && instance <= INT32_MAX, "there is no kernel ", instance);
    const cuda::Problem problem{
        kind, element(), B, static_cast<int>(H), static_cast<int>(D), backward, static_cast<int>(instance)};
    const std::optional<cuda::Plan> found = cuda::plan(problem, cuda::current_device());
    FUSED_RNN_CHECK(found, "this device cannot hold the recurrent weights of ", H, " units on the chip with ",
                    instance < 0 ? "any kernel" : "this kernel");
    return *found;
  }
  cuda::Sequence sequence() const {
    cuda::Sequence q{};
    q.T = T, q.B = B, q.H = static_cast<int>(H), q.directions = static_cast<int>(D);
    q.lengths = lengths, q.error = cuda::error_word(), q.patience = kPatience;
    return q;
  }

 private:
  using Guard = torch::stable::accelerator::DeviceGuard;

  static bool on_device(const Tensor& tensor) { return !tensor.is_cpu(); }
  bool same_device(const Tensor& tensor) const {
    return tensor.is_cpu() == like_.is_cpu() && tensor.get_device_index() == like_.get_device_index();
  }

  Tensor like_;
  std::optional<Guard> guard_;
};

// The address of index `at` of the first dimension; null without a tensor or without elements.
char* slice(const Tensor& tensor, int64_t at) {
  if (tensor.numel() == 0) return nullptr;
  const ScalarType type = tensor.scalar_type();
  const int64_t bytes = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  return static_cast<char*>(tensor.data_ptr()) + at * tensor.stride(0) * bytes;
}
char* slice(const OptionalTensor& tensor, int64_t at) { return tensor ? slice(*tensor, at) : nullptr; }

// The resident kernels load weights by 16 bytes; a view of a larger buffer may begin anywhere.
Tensor aligned(const Tensor& weights) {
  return reinterpret_cast<uintptr_t>(weights.data_ptr()) % 16 ? torch::stable::clone(weights) : weights;
}

// out = a @ b, by torch.
void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  FUSED_RNN_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
                  "torch.mm failed");
  torch::stable::detail::to<Tensor>(stack[0]);  // takes back the reference that the call returned
}

Tensor copied(const OptionalTensor& from, Tensor to) {
  if (from) {
    torch::stable::copy_(to, *from);
  } else {
    torch::stable::zero_(to);
  }
  return to;
}

// bool [T, B]: where sequences begin; those of a direction's first step are not looked at.
const uint8_t* checked_resets(const Layer& l, const OptionalTensor& resets) {
  if (!resets) return nullptr;
  return static_cast<const uint8_t*>(l.given(*resets, "resets", {l.T, l.B}, ScalarType::Bool).data_ptr());
}

// Of states [D, S, B, H] that come in at resets, S = T or 1 for all steps.
cuda::ResetState reset_state(const Layer& l, const OptionalTensor& h, const OptionalTensor& c, int64_t d) {
  const auto one = [](const OptionalTensor& t) { return t && t->numel() > 0 && t->size(1) == 1; };
  return {slice(h, d), slice(c, d), one(h) || one(c) ? 0 : l.B * l.H};
}
// The border between two neighbouring steps; none where one of them is outside the sequence.
cuda::StepResets between(const Layer& l, const uint8_t* resets, int64_t t, int64_t other) {
  if (!resets || other < 0 || other >= l.T || t < 0 || t >= l.T) return {nullptr, 0};
  const int64_t later = std::max(t, other);
  return {resets + later * l.B, later};
}
cuda::ResetState of_step(const cuda::ResetState& state, const Layer& l, int64_t t) {
  const auto at = [&](void* p) { return p ? static_cast<char*>(p) + t * state.step * l.bytes() : nullptr; };
  return {at(state.h), at(state.c), 0};
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// y [T, B, D*H], h_n and c_n [D, B, H], then what backward reads: h_prev [D, T, B, padded], saved [D, T, B, kSaved*H],
// c_prev [D, T, B, H]; those are empty without `train`, c_n and c_prev without c. Last c of every step, as y, if it is
// wanted.
Forward recurrence_forward(Tensor x_gates, OptionalTensor h0, OptionalTensor c0, int64_t cell, bool train,
                           bool resident, int64_t instance, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                           OptionalTensor lengths, OptionalTensor resets, OptionalTensor reset_h,
                           OptionalTensor reset_c, bool want_c_sequence) {
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
  const Tensor c_sequence = want_c_sequence ? l.empty({T, B, D * H}) : l.empty({0});

  const bool has_c = l.cell.has_c, keeps_c = train && has_c;
  const Tensor y = l.empty({T, B, D * H}), h_n = l.empty({D, B, H}), c_n = l.empty({has_c ? D : 0, B, H});
  const Tensor saved = l.empty({train ? D : 0, T, B, l.cell.saved * H});
  const Tensor c_prev = l.empty_arithmetic({keeps_c ? D : 0, T, B, H});
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
      p.h_prev = slice(h_prev, d), p.saved = slice(saved, d), p.c_prev = reinterpret_cast<float*>(slice(c_prev, d));
    }
    cuda::recurrence(l.kind).forward(l.element(), plan, params, l.stream);
    return {y, h_n, c_n, train ? h_prev : l.empty({0, T, B, l.padded}), saved, c_prev, c_sequence};
  }

  // h_prev[d][T] is h_n's place; without `train` two slots take turns.
  const int64_t slots = train ? T + 1 : 2;
  const Tensor h = l.empty({D, slots, B, H}), h_gates = l.empty({B, G * H});
  const Tensor c = l.empty_arithmetic({has_c ? D : 0, B, H});
  if (has_c) copied(c0, c);
  for (int64_t d = 0; d < D; ++d) {
    const Tensor h_d = select(h, 0, d), x_d = select(x_gates, 0, d),
                 y_d = torch::stable::narrow(const_cast<Tensor&>(y), 2, d * H, H);
    const Tensor w_t = torch::stable::transpose(select(w_hh, 0, d), 0, 1);
    const auto slot = [&](int64_t step) { return select(h_d, 0, !train ? step % 2 : d == 0 ? step : T - step); };
    copied(h0 ? OptionalTensor(select(*h0, 0, d)) : std::nullopt, slot(0));
    for (int64_t step = 0; step < T; ++step) {
      const int64_t t = d == 0 ? step : T - 1 - step, next = d == 0 ? t + 1 : t - 1;
      const Tensor from = slot(step), to = slot(step + 1), y_t = select(y_d, 0, t);
      mm_out(h_gates, from, w_t);
      cuda::StepForwardParams p{};
      p.t = t, p.B = B, p.H = static_cast<int>(H), p.lengths = l.lengths;
      p.x_gates = slice(x_d, t), p.h_gates = h_gates.data_ptr(), p.b_ih = slice(b_ih, d), p.b_hh = slice(b_hh, d);
      p.h_prev = from.data_ptr(), p.h = to.data_ptr(), p.c = slice(c, d);
      p.y = y_t.data_ptr(), p.y_stride = D * H;
      if (want_c_sequence) p.c_sequence = slice(c_sequence, t) + d * H * l.bytes();
      p.resets = between(l, begins, t, next);
      if (p.resets.at) p.reset = of_step(reset_state(l, reset_h, reset_c, d), l, next);
      if (train) {
        p.saved = slice(select(saved, 0, d), t);
        p.c_prev = keeps_c ? slice(select(c_prev, 0, d), t) : nullptr;
      }
      cuda::recurrence(l.kind).step_forward(l.stored_type(), p, l.stream);
    }
    Tensor last = select(h_n, 0, d);
    torch::stable::copy_(last, slot(T));
  }
  if (has_c) {
    Tensor out = c_n;
    torch::stable::copy_(out, c);
  }
  return {y, h_n, c_n, train ? h : l.empty({0, T, B, H}), saved, c_prev, c_sequence};
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// dgates [D, T, B, kGrads*padded], dh0 and dc0 [D, B, H] (dc0 empty without c).
Backward recurrence_backward(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n, Tensor h_prev, Tensor saved,
                             Tensor c_prev, int64_t cell, bool resident, int64_t instance, Tensor w_hh_t,
                             OptionalTensor lengths, OptionalTensor resets, bool need_dreset,
                             OptionalTensor dc_sequence) {
  FUSED_RNN_CHECK(saved.dim() == 4 && w_hh_t.dim() == 3, "saved must be [D, T, B, S*H] and w_hh_t [D, H, G*H]");
  const CellInfo info = cell_info(cell);
  const Layer l(saved, cell, resident, saved.size(0), saved.size(1), saved.size(2), saved.size(3) / info.saved,
                lengths);
  const int64_t D = l.D, T = l.T, B = l.B, H = l.H, G = info.gates;
  l.given(saved, "saved", {D, T, B, info.saved * H});
  if (info.uses_h) l.given(h_prev, "h_prev", {D, resident ? T : T + 1, B, l.padded});
  if (info.has_c) l.given(c_prev, "c_prev", {D, T, B, H}, l.arithmetic());
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
      p.c_prev = info.has_c ? reinterpret_cast<const float*>(slice(c_prev, d)) : nullptr;
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
    return {dgates, dh0, dc0, dreset_h, dreset_c};
  }

  const Tensor dgates = l.empty({D, T, B, info.grads * H});

  const Tensor dh = copied(dh_n, l.empty_arithmetic({D, B, H}));
  const Tensor dc = l.empty_arithmetic({info.has_c ? D : 0, B, H});
  if (info.has_c) copied(dc_n, dc);
  const Tensor product = l.empty({B, H});
  for (int64_t d = 0; d < D; ++d) {
    const Tensor dgates_d = select(dgates, 0, d), w = torch::stable::transpose(select(w_hh_t, 0, d), 0, 1);
    const auto hidden_grads = [&](int64_t t) {
      Tensor all = select(dgates_d, 0, t);
      return torch::stable::narrow(all, 1, info.hidden_grads * H, G * H);
    };
    for (int64_t step = 0; step <= T; ++step) {
      const int64_t t = d == 0 ? T - 1 - step : step, after = d == 0 ? t + 1 : t - 1;
      if (step > 0) mm_out(product, hidden_grads(after), w);
      cuda::StepBackwardParams p{};
      p.B = B, p.H = static_cast<int>(H), p.dh = slice(dh, d);
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
      p.c_prev = info.has_c ? slice(select(c_prev, 0, d), t) : nullptr;
      p.dy = dy ? slice(*dy, t) + d * H * l.bytes() : nullptr;
      p.dy_stride = D * H;
      p.dc_sequence = dc_sequence ? slice(*dc_sequence, t) + d * H * l.bytes() : nullptr;
      p.dgates = slice(dgates_d, t);
      cuda::recurrence(l.kind).step_backward(l.stored_type(), p, l.stream);
    }
  }
  if (info.has_c) {
    Tensor out = dc0;
    torch::stable::copy_(out, dc);
  }
  return {dgates, dh0, dc0, dreset_h, dreset_c};
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
      "Tensor? reset_c=None, bool want_c_sequence=False) -> "
      "(Tensor y, Tensor h_n, Tensor c_n, Tensor h_prev, Tensor saved, Tensor c_prev, Tensor c_sequence)");
  m.def(
      "recurrence_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor h_prev, Tensor saved, Tensor c_prev, "
      "int cell, bool resident, int instance, Tensor w_hh_t, Tensor? lengths=None, Tensor? resets=None, "
      "bool need_dreset=False, Tensor? dc_sequence=None) -> "
      "(Tensor dgates, Tensor dh0, Tensor dc0, Tensor dreset_h, Tensor dreset_c)");
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
