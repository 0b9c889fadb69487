// The Elman cell (Elman 1990; torch.nn.RNN):
//   h' = a(W_ih x + b_ih + W_hh h + b_hh),   a = tanh or relu
#pragma once

#include "math.h"

namespace fused_rnn {

struct Tanh {
  template <class V>
  static FUSED_RNN_INLINE V forward(const V& x) {
    return math::tanh(x);
  }
  template <class V>
  static FUSED_RNN_INLINE V backward(const V& y, const V& dy) {
    return dy * math::tanh_slope(y);
  }
};

struct Relu {
  template <class V>
  static FUSED_RNN_INLINE V forward(const V& x) {
    return math::relu(x);
  }
  template <class V>
  static FUSED_RNN_INLINE V backward(const V& y, const V& dy) {
    return y <= typename math::Lane<V>::Scalar(0) ? V{} : dy;
  }
};

template <class Activation>
struct RnnCell {
  static constexpr int kGates = 1;        // row blocks of W_ih and W_hh
  static constexpr int kSaved = 1;        // values per unit kept for backward: h'
  static constexpr int kGrads = 1;        // gradients per unit that backward gives
  static constexpr int kInputShift = 0;   // how many of the last gates come first in the gradients of W_ih x
  static constexpr int kHiddenGrads = 0;  // first gradient block that belongs to W_hh h
  static constexpr bool kHasC = false;    // a second state c
  static constexpr bool kUsesH = false;   // h enters other than through W_hh h
  static constexpr bool kSavesH = true;   // what is kept is h' itself

  template <class V>
  static FUSED_RNN_INLINE void forward(const V (&x)[1], const V (&r)[1], const V&, V&, V (&saved)[1], V& h) {
    saved[0] = h = Activation::forward(x[0] + r[0]);
  }

  template <class V>
  static FUSED_RNN_INLINE void backward(const V (&saved)[1], const V&, const V&, const V& dh, V&, V (&grads)[1], V&) {
    grads[0] = Activation::backward(saved[0], dh);
  }
};

}  // namespace fused_rnn
