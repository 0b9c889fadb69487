// A layer for the CUDA kernels: which of them run it, on which stream, and its rows as they take them.
//
// The kernels take padded batches [T, B, ...] in the tensors' own dtype. A packed sequence is padded before them, and
// where its rows end becomes their `lengths`; a single step is a sequence of one. While a CudaLayer lives, its device
// is the current one, and torch records no gradients.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../cuda/recurrence.h"
#include "cuda_tensors.h"
#include "layer.h"
#include "schemas.h"

#if !defined(FUSED_RNN_EMULATOR)
#include <dlfcn.h>
#endif

namespace fused_rnn {
namespace bindings {

constexpr uint64_t kPatience = 10'000'000'000;  // nanoseconds: no step of any layer takes that long

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

class CudaLayer : public Layer {
 public:
  bool resident = false;  // the recurrent weights stay on the chip for the whole sequence
  int64_t D, H, G;
  int64_t padded_H;         // H in whole 16-byte loads: a row's width where kernels exchange it
  bool normalises = false;  // h's share of the gates, or c
  void* stream;

  // The arguments are the operators', checked here.
  CudaLayer(int64_t cell_number, const Tensor& x, const OptionalTensor& w_ih, const Tensor& w_hh,
            const OptionalTensor& w_hr, const OptionalTensor& w_ih_reverse, const OptionalTensor& w_hh_reverse,
            const Options& options)
      : Layer(cell_number, Place(x), x.sizes(), x.scalar_type(), x.scalar_type(), w_hh.sizes(), w_hr.has_value(),
              w_hh_reverse.has_value(), options.batch_sizes),
        D(shape.directions),
        H(shape.H),
        G(cell.gates) {
    FUSED_RNN_CHECK(place.type() == device_type(), "x must be on a CUDA device");
    FUSED_RNN_CHECK(!shape.projected, "the CUDA kernels have no projection");
    FUSED_RNN_CHECK(T <= INT32_MAX && B > 0 && H > 0 && H < (1 << 24),
                    "the CUDA kernels take at most 2^31 - 1 steps, and at least one row and unit, got ", T, ", ", B,
                    ", ", H);
    without_input_weights(w_ih.has_value(), w_ih_reverse.has_value());
    const int64_t whole = 16 / element();
    padded_H = (H + whole - 1) / whole * whole;
    if (!place.is_cpu()) guard_.emplace(place.index());
    stream = current_stream(place.index());
    if (packed) find_rows();
    if (const OptionalTensor& lengths = options.lengths) {
      FUSED_RNN_CHECK(!step && !packed, "lengths need x to be [T, B, I]");
      const ScalarType type = lengths->scalar_type();
      FUSED_RNN_CHECK(type == ScalarType::Int || type == ScalarType::Long, "lengths must be int32 or int64");
      lengths_ = converted(checked(*lengths, "lengths", {B}, type, place), ScalarType::Int);
    }
    replace_at(options.resets);
    if (packed && resets) resets = view(padded(view(*resets, {shape.N, 1})), {T, B});
    int32_t* const error = cuda::error_word();
    if (*error != 0) {
      *error = 0;
      fail("an earlier kernel waited for another block in vain and gave up; its results are NaN");
    }
  }

  void regularise(Options& o) {
    Layer::regularise(o);
    if (o.drop_h) o.drop_h = view(*o.drop_h, {D, B, H});
    for (OptionalTensor* zone : {&o.zone_h, &o.zone_c}) {
      if (*zone && (*zone)->dim() > 1) *zone = padded(**zone);
    }
    normalises = o.norm_hh || o.norm_c;
  }

  // Which kernels; forward and backward of a call must come to the same answer, so it depends on the arguments and the
  // device alone. `instance` as in schemas.h.
  void choose(bool tf32, int64_t instance) {
    FUSED_RNN_CHECK(instance >= kEveryStep && instance <= INT32_MAX, "there is no kernel ", instance);
    instance_ = static_cast<int>(instance);
    const bool multiplies = dtype != ScalarType::Double && (dtype != ScalarType::Float || tf32);
    if (instance >= 0) {
      FUSED_RNN_CHECK(multiplies, "the resident kernels take bfloat16, float16, or float32 with tf32");
      FUSED_RNN_CHECK(!normalises, "the resident kernels know no layer normalisation");
      resident = true;
    } else if (instance == kPlanned) {
      resident = multiplies && !normalises && T > 1 && !plans(false).empty() && !plans(true).empty();
    }
  }
  cuda::Plan plan(bool backward) const {
    const std::vector<cuda::Plan> found = plans(backward);
    FUSED_RNN_CHECK(!found.empty(), "this device cannot hold the recurrent weights of ", H, " units on the chip with ",
                    instance_ < 0 ? "any kernel" : "this kernel");
    return found.front();
  }
  int64_t width() const { return resident ? padded_H : H; }  // of rows that kernels exchange

  cuda::Element kernel_element() const {
    return dtype == ScalarType::BFloat16 ? cuda::Element::kBf16
           : dtype == ScalarType::Half   ? cuda::Element::kFp16
                                         : cuda::Element::kTf32;
  }
  cuda::StoredType stored_type() const {
    return dtype == ScalarType::BFloat16 ? cuda::StoredType::kBf16
           : dtype == ScalarType::Half   ? cuda::StoredType::kFp16
           : dtype == ScalarType::Double ? cuda::StoredType::kFloat64
                                         : cuda::StoredType::kFloat32;
  }
  ScalarType arithmetic() const { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

  cuda::Sequence sequence() const {
    cuda::Sequence q{};
    q.T = T, q.B = B, q.H = static_cast<int>(H), q.directions = static_cast<int>(D);
    q.lengths = row_lengths(), q.resets = row_resets();
    q.error = cuda::error_word(), q.patience = kPatience;
    return q;
  }
  const int32_t* row_lengths() const { return static_cast<const int32_t*>(data(lengths_)); }  // [B], may be null
  const uint8_t* row_resets() const { return static_cast<const uint8_t*>(data(resets)); }     // [T, B], may be null

  // [T, B, width] from a tensor of the call's rows; zeros where a packed row has ended.
  Tensor padded(const Tensor& rows) const {
    const int64_t width = rows.size(rows.dim() - 1);
    if (!packed) return view(rows, {T, B, width});
    const Tensor out = cleared(empty({T * B, width}, rows.scalar_type(), place));
    call("aten::index_copy_", "", out, int64_t{0}, *rows_, rows);
    return view(out, {T, B, width});
  }
  OptionalTensor padded(const OptionalTensor& rows) const { return rows ? OptionalTensor(padded(*rows)) : rows; }
  // A result of the kernels, [T, B, width], and what the operator returns of it. Neither is a view of another tensor:
  // users may write to results.
  Tensor new_padded(int64_t width) const { return packed ? new_tensor({T, B, width}) : new_sequence(width); }
  Tensor unpadded(const Tensor& padded) const {
    if (!packed) return padded;
    return call("aten::index_select", "", view(padded, {T * B, padded.size(2)}), int64_t{0}, *rows_);
  }

  // bool [B, 1], the rows that begin anew at step 0: the kernels look at no border before a direction's first step.
  OptionalTensor begin_anew() const {
    if (!resets) return std::nullopt;
    Tensor begins = select(*resets, 0, 0);
    if (lengths_)
      begins = call("aten::logical_and", "", begins, call("aten::gt", "Tensor", *lengths_, zero_like(*lengths_)));
    return view(begins, {B, 1});
  }

 private:
  using Guard = torch::stable::accelerator::DeviceGuard;

  static int32_t device_type() {
#if defined(FUSED_RNN_EMULATOR)
    return aoti_torch_device_type_cpu();
#else
    return aoti_torch_device_type_cuda();
#endif
  }

  std::vector<cuda::Plan> plans(bool backward) const {
    return cuda::plans(
        {cell.kind, kernel_element(), B, static_cast<int>(H), static_cast<int>(D), backward, std::max(instance_, -1)},
        cuda::current_device());
  }

  // Where the rows of a packed sequence are in the padded one, and how many each batch row has.
  void find_rows() {
    const Tensor places = empty({shape.N}, ScalarType::Long), counts = empty({B}, ScalarType::Int);
    int64_t* place_of = static_cast<int64_t*>(places.data_ptr());
    int32_t* const count_of = static_cast<int32_t*>(counts.data_ptr());
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t b = 0; b < ragged.batch_sizes[t]; ++b)
        *place_of++ = t * B + b, count_of[b] = static_cast<int32_t>(t + 1);
    }
    rows_ = there(places), lengths_ = there(counts);
  }
  Tensor there(const Tensor& tensor) const {
    if (place.is_cpu()) return tensor;
    const Tensor copy = empty(tensor.sizes(), tensor.scalar_type(), place);
    call("aten::copy_", "", copy, tensor, true);  // does not wait for the GPU
    return copy;
  }

  NoGrad no_grad_;
  std::optional<Guard> guard_;
  OptionalTensor rows_, lengths_;
  int instance_ = static_cast<int>(kPlanned);
};

}  // namespace bindings
}  // namespace fused_rnn
