// Gated recurrent unit (Cho et al. 2014, in the variant of torch.nn.GRU, whose reset gate acts on the product W_hn h):
//   r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
//   z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
//   n = tanh   (W_in x + b_in + r * (W_hn h + b_hn))
//   h' = (1 - z) * n + z * h
#pragma once

#include "math.h"

namespace fused_rnn {

struct GruCell {
  static constexpr int kGates = 3;
  static constexpr int kSaved = 4;  // r, z, n, W_hn h + b_hn
  // W_in x receives the gradient dn of n's pre-activation, W_hn h receives dn * r. Backward therefore stores four
  // blocks, in an order in which the gradients of both products are contiguous: dn, dr, dz, dn * r. The first three are
  // those of W_ih x (as n r z), the last three those of W_hh h (in torch's order r z n).
  static constexpr int kGrads = 4;
  static constexpr int kInputShift = 1;
  static constexpr int kHiddenGrads = 1;
  static constexpr bool kHasC = false;
  static constexpr bool kUsesH = true;
  static constexpr bool kSavesH = false;

  template <class V>
  static FUSED_RNN_INLINE void forward(const V (&x)[3], const V (&wh)[3], const V& h_prev, V&, V (&saved)[4], V& h) {
    const V r = math::sigmoid(x[0] + wh[0]);
    const V z = math::sigmoid(x[1] + wh[1]);
    const V n = math::tanh(x[2] + r * wh[2]);
    h = (h_prev - n) * z + n;
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = wh[2];
  }

  // dh_prev: the gradient of h through z * h, without the part through W_hh h.
  template <class V>
  static FUSED_RNN_INLINE void backward(const V (&saved)[4], const V& h_prev, const V&, const V& dh, V&, V (&grads)[4],
                                        V& dh_prev) {
    const V r = saved[0], z = saved[1], n = saved[2];
    const V dn = (dh - dh * z) * math::tanh_slope(n);
    grads[0] = dn;
    grads[1] = dn * saved[3] * math::sigmoid_slope(r);
    grads[2] = dh * (h_prev - n) * math::sigmoid_slope(z);
    grads[3] = dn * r;
    dh_prev = dh * z;
  }
};

}  // namespace fused_rnn
