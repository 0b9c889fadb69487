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

// The members that every cell has. The CPU and CUDA kernels size their buffers by the constants.
template <class Activation>
struct RnnCell {
  static constexpr int kGates = 1;        // row blocks of W_ih and W_hh
  static constexpr int kSaved = 1;        // values per unit that forward saves for backward; here h'
  static constexpr int kGrads = 1;        // blocks of gate gradients that backward returns
  static constexpr int kInputShift = 0;   // W_ih x has blocks 0 to kGates - 1, its last kInputShift gates first
  static constexpr int kHiddenGrads = 0;  // W_hh h has kGates blocks, in order, from this one on
  static constexpr bool kHasC = false;    // the cell has a second state c; then kOutputGate is the saved o of o tanh(c)
  static constexpr bool kUsesH = false;   // the cell reads h outside W_hh h
  static constexpr bool kSavesH = true;   // the saved value is h', so that it can serve as the next step's h_prev

  // One unit. x: W_ih x + b_ih of each gate; wh: W_hh h + b_hh of each gate; then h; c, replaced by c'; out: the saved
  // values and h'.
  template <class V>
  static FUSED_RNN_INLINE void forward(const V (&x)[1], const V (&wh)[1], const V&, V&, V (&saved)[1], V& h) {
    saved[0] = h = Activation::forward(x[0] + wh[0]);
  }

  // From the saved values, h, c, the gradient of h', and the gradient of c' (replaced by that of c): the gates'
  // gradients and, where kUsesH, the gradient of h outside W_hh h.
  template <class V>
  static FUSED_RNN_INLINE void backward(const V (&saved)[1], const V&, const V&, const V& dh, V&, V (&grads)[1], V&) {
    grads[0] = Activation::backward(saved[0], dh);
  }
};

}  // namespace fused_rnn
