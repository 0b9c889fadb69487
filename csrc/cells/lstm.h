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
  static constexpr int kGrads = 4;
  static constexpr int kInputShift = 0;
  static constexpr int kHiddenGrads = 0;
  static constexpr bool kHasC = true;
  static constexpr bool kUsesH = false;
  static constexpr bool kSavesH = false;

  template <class V>
  static FUSED_RNN_INLINE void forward(const V (&x)[4], const V (&r)[4], const V&, V& c, V (&saved)[4], V& h) {
    const V i = math::sigmoid(x[0] + r[0]);
    const V f = math::sigmoid(x[1] + r[1]);
    const V g = math::tanh(x[2] + r[2]);
    const V o = math::sigmoid(x[3] + r[3]);
    c = f * c + i * g;
    h = o * math::tanh(c);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }

  // dc comes in as the gradient of c', leaves as that of c. tanh(c') is cheaper to compute again than to keep.
  template <class V>
  static FUSED_RNN_INLINE void backward(const V (&saved)[4], const V&, const V& c, const V& dh, V& dc, V (&grads)[4],
                                        V&) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = math::tanh(f * c + i * g);
    const V dc_next = dc + dh * o * math::tanh_slope(tanh_c);
    grads[0] = dc_next * g * math::sigmoid_slope(i);
    grads[1] = dc_next * c * math::sigmoid_slope(f);
    grads[2] = dc_next * i * math::tanh_slope(g);
    grads[3] = dh * tanh_c * math::sigmoid_slope(o);
    dc = dc_next * f;
  }
};

}  // namespace fused_rnn
