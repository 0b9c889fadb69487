// What forward keeps for backward, in one buffer of bytes. Its size depends on the call alone, not on which kernels run
// it: a compiler asks for it where there is no GPU (fused_rnn/fakes.py computes the same).
#pragma once

#include "cuda_layer.h"

namespace fused_rnn {
namespace bindings {

class CudaReserve {
 public:
  CudaReserve(const CudaLayer& l, const Options& o) : l_(l) {
    const int64_t D = l.D, T = l.T, B = l.B, H = l.H, number = element_size(l.arithmetic());
    const bool keeps_state = l.cell.has_c || (l.cell.uses_h && o.drop_h);
    h_prev_ = take({D, T + 1, B, l.padded_H, l.element()});
    saved_ = take({D, T, B, l.cell.saved, H, l.element()});
    state_prev_ = take({keeps_state ? D : 0, T, B, H, number});
    h_gates_ = take({o.norm_hh ? D : 0, T, B, l.G, H, l.element()});
    statistics_ = take({l.normalises ? D : 0, T, B, 4, number});
  }
  int64_t bytes() const { return bytes_; }

  // The parts of such a buffer. They do not keep it alive.
  struct Parts {
    Tensor h_prev;     // h, times drop_h, as each step multiplied it: [D, T, B, padded_H] of the resident kernels, else
                       // [D, T + 1, B, H], where the reverse direction begins at slot T and ends at slot 0
    Tensor h_gates;    // [D, T, B, G*H] W_hh h before its normalisation; undefined without
    char* saved;       // [D, T, B, kSaved*H]
    char* state_prev;  // [D, T, B, H] c, or h before dropout, as the step consumed it; in `arithmetic`. May be null
    char* statistics;  // [D, T, B, 4] of both normalisations; may be null
  };
  Parts parts(const Tensor& reserve) const {
    char* const base = static_cast<char*>(reserve.data_ptr());
    const auto at = [&](const Region& r) { return r.bytes > 0 ? base + r.begin : nullptr; };
    Parts p{};
    p.h_prev = l_.resident ? tensor(at(h_prev_), {l_.D, l_.T, l_.B, l_.padded_H})
                           : tensor(at(h_prev_), {l_.D, l_.T + 1, l_.B, l_.H});
    if (h_gates_.bytes > 0) p.h_gates = tensor(at(h_gates_), {l_.D, l_.T, l_.B, l_.G * l_.H});
    p.saved = at(saved_), p.state_prev = at(state_prev_), p.statistics = at(statistics_);
    return p;
  }

 private:
  struct Region {
    int64_t begin, bytes;
  };

  Region take(std::initializer_list<int64_t> factors) {
    int64_t size = 1;
    bool fits = true;
    for (const int64_t factor : factors) fits = fits && !__builtin_mul_overflow(size, factor, &size);
    FUSED_RNN_CHECK(fits && size < INT64_MAX / 16, "a buffer of shape ", shape_text(factors), " is too large");
    const Region region{bytes_, size};
    bytes_ += (size + 15) / 16 * 16;
    return region;
  }
  Tensor tensor(void* at, std::initializer_list<int64_t> sizes) const {
    std::array<int64_t, 4> strides{};
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0; stride *= sizes.begin()[i]) strides[i] = stride;
    AtenTensorHandle handle;
    const AOTITorchError error =
        aoti_torch_create_tensor_from_blob(at, static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(), 0,
                                           type_number(l_.dtype), l_.place.type(), l_.place.index(), &handle);
    FUSED_RNN_CHECK(error == AOTI_TORCH_SUCCESS, "found no memory behind the reserve");
    return Tensor(handle);
  }

  const CudaLayer& l_;
  int64_t bytes_ = 0;
  Region h_prev_, saved_, state_prev_, h_gates_, statistics_;
};

}  // namespace bindings
}  // namespace fused_rnn
