// Long short-term memory (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000; torch.nn.LSTM):
//   i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)       c' = f * c + i * g
//   f = sigmoid(W_if x + b_if + W_hf h + b_hf)       h' = o * tanh(c')
//   g = tanh   (W_ig x + b_ig + W_hg h + b_hg)
//   o = sigmoid(W_io x + b_io + W_ho h + b_ho)       with a projection: h' = W_hr (o * tanh(c'))
#pragma once

#include "math.h"

namespace fused_rnn {

struct LstmCell {
  static constexpr int kGates = 4;
  static constexpr int kSaved = 4;  // i, f, g, o
  static constexpr int kOutputGate = 3;
  static constexpr int kGrads = 4;
  static constexpr int kInputShift = 0;
  static constexpr int kHiddenGrads = 0;
  static constexpr bool kHasC = true;
  static constexpr bool kUsesH = false;
  static constexpr bool kSavesH = false;

  template <class V>
  static FUSED_RNN_INLINE void forward(const V (&x)[4], const V (&wh)[4], const V&, V& c, V (&saved)[4], V& h) {
    const V i = math::sigmoid(x[0] + wh[0]);
    const V f = math::sigmoid(x[1] + wh[1]);
    const V g = math::tanh(x[2] + wh[2]);
    const V o = math::sigmoid(x[3] + wh[3]);
    c = f * c + i * g;
    h = output(o, c);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }

  // h' before the projection. With layer normalisation, the caller passes the normalised c'.
  template <class V>
  static FUSED_RNN_INLINE V output(const V& o, const V& c) {
    return o * math::tanh(c);
  }

  // On entry dc is the gradient of c' from the next step, on return the gradient of c. c' and tanh(c') are recomputed,
  // which is cheaper than to store and load them.
  template <class V>
  static FUSED_RNN_INLINE void backward(const V (&saved)[4], const V&, const V& c, const V& dh, V& dc, V (&grads)[4],
                                        V&) {
    dc += output_backward(saved[3], next_c(saved, c), dh, grads[3]);
    gates_backward(saved, c, dc, grads);
  }

  template <class V>
  static FUSED_RNN_INLINE V next_c(const V (&saved)[4], const V& c) {
    return saved[1] * c + saved[0] * saved[2];
  }

  // Backward of output(o, c): returns the gradient of c, and sets grad_o, the gradient of o before its sigmoid.
  template <class V>
  static FUSED_RNN_INLINE V output_backward(const V& o, const V& c, const V& dh, V& grad_o) {
    const V tanh_c = math::tanh(c);
    grad_o = dh * tanh_c * math::sigmoid_slope(o);
    return dh * o * math::tanh_slope(tanh_c);
  }

  // Backward of next_c and the gates i, f, g. On entry dc is the whole gradient of c', on return the gradient of c.
  template <class V>
  static FUSED_RNN_INLINE void gates_backward(const V (&saved)[4], const V& c, V& dc, V (&grads)[4]) {
    const V i = saved[0], f = saved[1], g = saved[2];
    grads[0] = dc * g * math::sigmoid_slope(i);
    grads[1] = dc * c * math::sigmoid_slope(f);
    grads[2] = dc * i * math::tanh_slope(g);
    dc = dc * f;
  }
};

}  // namespace fused_rnn
