// A layer as the CUDA operators see it: its sizes and types, checks of what they are given, addresses in it, and the
// few operations of torch's that a step needs.
#pragma once

#include <torch/csrc/stable/accelerator.h>

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

using torch::stable::new_empty;

constexpr uint64_t kPatience = 10'000'000'000;  // nanoseconds: no step of any layer takes that long

struct CellInfo {
  int64_t gates, saved, grads, hidden_grads;
  bool has_c, uses_h;
};

inline CellInfo cell_info(int64_t cell) {
  switch (cell) {
#define FUSED_RNN_INFO(kind, policy, label)  \
  case static_cast<int64_t>(CellKind::kind): \
    return {policy::kGates, policy::kSaved, policy::kGrads, policy::kHiddenGrads, policy::kHasC, policy::kUsesH};
    FUSED_RNN_CELLS(FUSED_RNN_INFO)
#undef FUSED_RNN_INFO
  }
  fail("unknown cell ", cell);
}

inline void* current_stream([[maybe_unused]] int32_t device) {
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
inline char* slice(const Tensor& tensor, int64_t at) {
  if (tensor.numel() == 0) return nullptr;
  const ScalarType type = tensor.scalar_type();
  const int64_t bytes = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  return static_cast<char*>(tensor.data_ptr()) + at * tensor.stride(0) * bytes;
}
inline char* slice(const OptionalTensor& tensor, int64_t at) { return tensor ? slice(*tensor, at) : nullptr; }

// The resident kernels load weights by 16 bytes; a view of a larger buffer may begin anywhere.
inline Tensor aligned(const Tensor& weights) {
  return reinterpret_cast<uintptr_t>(weights.data_ptr()) % 16 ? torch::stable::clone(weights) : weights;
}

// out = a @ b or a * b, by torch: `operation` is aten::mm or aten::mul.
inline void into(const Tensor& out, const char* operation, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  FUSED_RNN_CHECK(torch_call_dispatcher(operation, "out", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
                  operation, " failed");
  torch::stable::detail::to<Tensor>(stack[0]);  // takes back the reference that the call returned
}

inline Tensor copied(const OptionalTensor& from, Tensor to) {
  if (from) {
    torch::stable::copy_(to, *from);
  } else if (to.numel() > 0) {
    torch::stable::zero_(to);
  }
  return to;
}

// bool [T, B]: where sequences begin; those of a direction's first step are not looked at.
inline const uint8_t* checked_resets(const Layer& l, const OptionalTensor& resets) {
  if (!resets) return nullptr;
  return static_cast<const uint8_t*>(l.given(*resets, "resets", {l.T, l.B}, ScalarType::Bool).data_ptr());
}

// Of states [D, S, B, H] that come in at resets, S = T or 1 for all steps.
inline cuda::ResetState reset_state(const Layer& l, const OptionalTensor& h, const OptionalTensor& c, int64_t d) {
  const auto one = [](const OptionalTensor& t) { return t && t->numel() > 0 && t->size(1) == 1; };
  return {slice(h, d), slice(c, d), one(h) || one(c) ? 0 : l.B * l.H};
}
// The border between two neighbouring steps; none where one of them is outside the sequence.
inline cuda::StepResets between(const Layer& l, const uint8_t* resets, int64_t t, int64_t other) {
  if (!resets || other < 0 || other >= l.T || t < 0 || t >= l.T) return {nullptr, 0};
  const int64_t later = std::max(t, other);
  return {resets + later * l.B, later};
}
inline cuda::ResetState of_step(const cuda::ResetState& state, const Layer& l, int64_t t) {
  const auto at = [&](void* p) { return p ? static_cast<char*>(p) + t * state.step * l.bytes() : nullptr; };
  return {at(state.h), at(state.c), 0};
}

// Recurrent dropout [D, B, H], zoneout [T, B, D*H] or of all steps [D*H], and gains and bias of layer normalisation
// [D, G*H], [D, H].
struct Regularisation {
  OptionalTensor drop_h, zone_h, zone_c, norm_hh, norm_c, norm_c_bias;
  double eps;

  bool normalises() const { return norm_hh || norm_c; }
  void check(const Layer& l) const {
    l.given(drop_h, "drop_h", {l.D, l.B, l.H});
    for (const auto& [zone, name] : {std::pair{&zone_h, "zone_h"}, std::pair{&zone_c, "zone_c"}}) {
      if (*zone && (*zone)->dim() == 1) {
        l.given(*zone, name, {l.D * l.H});
      } else {
        l.given(*zone, name, {l.T, l.B, l.D * l.H});
      }
    }
    l.given(norm_hh, "norm_hh", {l.D, l.cell.gates * l.H});
    l.given(norm_c, "norm_c", {l.D, l.H});
    l.given(norm_c_bias, "norm_c_bias", {l.D, l.H});
    FUSED_RNN_CHECK(l.cell.has_c || !(zone_c || norm_c), "only the LSTM has c");
    FUSED_RNN_CHECK(norm_c || !norm_c_bias, "norm_c_bias goes with norm_c");
    FUSED_RNN_CHECK(!l.resident || !normalises(), "the resident kernels know no layer normalisation");
  }
  // Of direction d; and at time t.
  static cuda::Zone zone(const Layer& l, const OptionalTensor& given, int64_t d) {
    if (!given) return {nullptr, 0};
    return {slice(*given, 0) + d * l.H * l.bytes(), given->dim() == 1 ? 0 : l.D * l.H};
  }
  static cuda::Zone zone(const Layer& l, const OptionalTensor& given, int64_t d, int64_t t) {
    const cuda::Zone z = zone(l, given, d);
    return {z.at ? static_cast<const char*>(z.at) + t * l.B * z.stride * l.bytes() : nullptr, z.stride};
  }
  cuda::StepNorms norms(int64_t d, const Tensor& statistics_of_step) const {
    return {slice(norm_hh, d), slice(norm_c, d), slice(norm_c_bias, d), eps, statistics_of_step.data_ptr()};
  }
};

}  // namespace bindings
}  // namespace fused_rnn
