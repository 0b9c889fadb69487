// A layer's recurrence on a GPU, all directions: between the product W_ih x of all time steps and y, and back from dy
// to the gates' gradients.
//
// It takes one of two ways. Resident kernels keep the recurrent weights on the chip for the whole sequence. Otherwise,
// and always with layer normalisation, every step is a product and a pointwise kernel. All tensors are contiguous.
#pragma once

#include "cuda_reserve.h"

namespace fused_rnn {
namespace bindings {

struct CudaForward {
  struct Direction {
    Tensor x_gates;             // [T, B, G*H]
    Tensor w_hh;                // [G*H, width()]
    OptionalTensor b_ih, b_hh;  // [G*H]
    OptionalTensor h0, c0;      // [B, H]
  };
  const CudaLayer& layer;
  const Options& options;
  std::vector<Direction> directions;
  Tensor y;                                // [T, B, D*H] out; a single step's T and D may be left out, here and below
  Tensor h_n, c_n;                         // [D, B, H] out; c_n undefined without c
  Tensor c_sequence;                       // as y, out; undefined: not wanted
  std::optional<CudaReserve::Parts> kept;  // out; none in inference

  void run() const;

 private:
  void run_resident() const;
  void run_steps() const;
  void run_steps(int64_t d, const Tensor& h, const Tensor& c, const Tensor& kept_h) const;
};

struct CudaBackward {
  const CudaLayer& layer;
  const Options& options;
  CudaReserve::Parts kept;
  std::vector<Tensor> w_hh;  // of each direction: [H, G*padded_H], transposed, for the resident kernels; else [G*H, H]
  OptionalTensor dy, dc_sequence;  // [T, B, D*H]
  OptionalTensor dh_n, dc_n;       // [D, B, H]
  Tensor dgates;                   // [D, T, B, kGrads*width()] out
  Tensor dh0, dc0;                 // [D, B, H] out, of the states as the first step consumed them
  Tensor dreset_h, dreset_c;       // [T, D, B, H] out, zeros before; undefined: not wanted
  Tensor dh_gates;                 // [D, T, B, G*H] out, of W_hh h before its normalisation; undefined without
  Tensor dnorm_hh, dnorm_c;        // [D, B, G*H] and [D, B, 2, H], each batch row's part; undefined without

  void run() const;

 private:
  void run_resident() const;
  void run_steps() const;
  void run_steps(int64_t d, const Tensor& dh, const Tensor& dc) const;
};

}  // namespace bindings
}  // namespace fused_rnn
