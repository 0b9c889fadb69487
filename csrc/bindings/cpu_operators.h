// The CPU's operators as C++ functions, which check all that a kernel relies on. ops.cpp registers them with torch, but
// for `stack` and `stack_backward` (stack.cpp), which are no operators; direct.cpp, plain.cpp and node.cpp call them
// from Python without torch's dispatcher.
#pragma once

#include "../cpu/dispatch.h"
#include "options.h"
#include "schemas.h"

namespace fused_rnn {
namespace bindings {

FUSED_RNN_EXPORT Results forward(Tensor x, OptionalTensor h0, OptionalTensor c0, int64_t cell, bool train,
                                 OptionalTensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                 OptionalTensor w_hr, OptionalTensor w_ih_reverse, OptionalTensor w_hh_reverse,
                                 OptionalTensor b_ih_reverse, OptionalTensor b_hh_reverse, OptionalTensor w_hr_reverse,
                                 GivenOptions given, bool want_c_sequence, bool deterministic, bool tf32,
                                 int64_t precision, int64_t instance);

FUSED_RNN_EXPORT Gradients backward(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n, Tensor x,
                                    Tensor reserve, int64_t cell, bool need_dx, bool need_dstate, bool need_dw_ih,
                                    bool need_dw_hh, bool need_db, bool need_dw_hr, OptionalTensor w_ih, Tensor w_hh,
                                    OptionalTensor w_hr, OptionalTensor w_ih_reverse, OptionalTensor w_hh_reverse,
                                    OptionalTensor w_hr_reverse, GivenOptions given, int64_t reset_steps,
                                    OptionalTensor dc_sequence, bool deterministic, bool tf32, int64_t precision,
                                    int64_t instance);

// One step of one layer in inference: h and c of [B, ...].
FUSED_RNN_EXPORT std::tuple<Tensor, Tensor> step(Tensor x, OptionalTensor h0, OptionalTensor c0, int64_t cell,
                                                 Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                                 OptionalTensor w_hr, bool deterministic);

// y, h_n (undefined for a cell), c_n (undefined but for the LSTM) and, with `train`, what backward reads: y of the
// layers below the last [(L-1)*T, B, D*P] (undefined without such), and the reserves of all [L*D, ...], as Results has
// them of one layer.
using StackResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// All layers of a module. layers: 0 for a cell, one step of one layer with states of [B, ...]. weights: of each layer
// and direction w_ih, w_hh, then biases if there are, then w_hr if projected. layout: a Layout. resets: bool, laid out
// as x without its last dimension; lengths: as in RaggedRows. A cell has neither.
FUSED_RNN_EXPORT StackResults stack(Tensor x, OptionalTensor h0, OptionalTensor c0, std::vector<Tensor> weights,
                                    int64_t cell, int64_t layers, int64_t directions, bool has_biases, bool projected,
                                    int64_t layout, OptionalTensor resets, OptionalTensor lengths, bool deterministic,
                                    bool train);

// Gradients of x, h0, c0 and all weights, in this order, undefined where `needs` says no. dy, dh_n and dc_n are shaped
// as y, h_n and c_n of `stack`, between and reserve are its own; weights, whose biases may be absent, and the rest are
// its arguments.
FUSED_RNN_EXPORT std::vector<Tensor> stack_backward(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n,
                                                    Tensor x, OptionalTensor between, Tensor reserve,
                                                    std::vector<OptionalTensor> weights, int64_t cell, int64_t layers,
                                                    int64_t directions, bool has_biases, bool projected, int64_t layout,
                                                    OptionalTensor resets, OptionalTensor lengths,
                                                    std::vector<bool> needs);

}  // namespace bindings
}  // namespace fused_rnn
