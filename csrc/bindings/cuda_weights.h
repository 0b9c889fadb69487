// Weights in the order and width of the gates' gradients.
//
// Backward gives gradients in blocks of one gate each, padded to whole 16-byte loads where kernels exchange them; those
// of W_ih x begin with the last `input_shift` gates (csrc/cells/gru.h says why). Rolling and padding the weights costs
// one pass over them, which is less than doing it to the gradients of all time steps.
#pragma once

#include "cuda_layer.h"

namespace fused_rnn {
namespace bindings {

// to[i] = from[(i - shift) mod G] along dimension `dim`, of size G in both.
inline void copy_rolled(const Tensor& from, const Tensor& to, int64_t dim, int64_t shift) {
  const int64_t G = from.size(dim);
  if (shift == 0) return copy(from, to);
  copy(narrow(from, dim, 0, G - shift), narrow(to, dim, shift, G - shift));
  copy(narrow(from, dim, G - shift, shift), narrow(to, dim, 0, shift));
}

class GateOrder {
 public:
  GateOrder(const CudaLayer& layer, int64_t shift) : G_(layer.G), H_(layer.H), width_(layer.width()), shift_(shift) {}

  // Rows [G*H, n] as the gradients have them, [G*width, n].
  Tensor arranged(const Tensor& rows) const {
    if (is_plain()) return rows;
    const int64_t n = rows.size(1);
    const Tensor out = cleared(empty({G_, width_, n}, rows.scalar_type(), Place(rows)));
    copy_rolled(view(rows, {G_, H_, n}), narrow(out, 1, 0, H_), 0, shift_);
    return view(out, {G_ * width_, n});
  }
  // The inverse, of rows [G*width, n] or of a vector.
  Tensor restored(const Tensor& rows) const {
    if (is_plain()) return rows;
    const bool is_vector = rows.dim() == 1;
    const int64_t n = is_vector ? 1 : rows.size(1);
    const ScalarType dtype = rows.scalar_type();
    const Tensor out = is_vector ? empty({G_ * H_}, dtype, Place(rows)) : empty({G_ * H_, n}, dtype, Place(rows));
    copy_rolled(narrow(view(rows, {G_, width_, n}), 1, 0, H_), view(out, {G_, H_, n}), 0, (G_ - shift_) % G_);
    return out;
  }
  // The inverse for columns: from [n, G*width] into [n, G, H], which may have any strides.
  void restore_columns(const Tensor& columns, const Tensor& to) const {
    copy_rolled(narrow(view(columns, {columns.size(0), G_, width_}), 2, 0, H_), to, 1, (G_ - shift_) % G_);
  }

 private:
  bool is_plain() const { return shift_ == 0 && width_ == H_; }

  int64_t G_, H_, width_, shift_;
};

// W_hh [G*H, H] as the resident forward kernels load it: rows of whole 16 bytes, zero behind the units.
inline Tensor with_padded_columns(const CudaLayer& layer, const Tensor& w_hh) {
  if (layer.width() == layer.H) return w_hh;
  const Tensor out = cleared(layer.new_tensor({layer.G * layer.H, layer.width()}));
  copy(w_hh, narrow(out, 1, 0, layer.H));
  return out;
}

}  // namespace bindings
}  // namespace fused_rnn
