// The operators that every device's library registers for its own tensors: one layer, in one or two directions.
#pragma once

#include <tuple>

#include "tensors.h"

namespace fused_rnn {
namespace bindings {

// y, h_n, c_n, reserve, c of every step (as y). c_n is empty without c, h_n for a single step (it would be y), reserve
// without `train`, the last one unless it is wanted. `reserve` is the device's own, for its backward.
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// dx, dh0, dc0, then dw_ih, dw_hh, db_ih, db_hh, dw_hr of each direction, then of the states at resets (reset_steps:
// 1 if they are the same at all steps, -1 if each has its own, 0 if no gradient is wanted), of norm_hh [D, G*H], of
// norm_c and norm_c_bias [D, 2, H]; what was not asked for is undefined: None in Python.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// `cell`: its number, see cell_number.h. `options`: see options.h. `deterministic`: bit for bit the same for a row
// alone and in any batch.
//
// For the CPU alone, and the same in both passes: `precision` of products of float32, cpu::Precision as a number. For
// CUDA alone, and the same in both passes: `tf32`, whether products of float32 may be computed in TF32.
//
// `instance`, the same in both passes: which kernels; see fused_rnn/options.py.
constexpr int64_t kPlanned = -1;    // the planner's choice; on the CPU the process's
constexpr int64_t kEveryStep = -2;  // a product and a pointwise kernel for every step

constexpr const char* kForwardSchema =
    "forward(Tensor x, Tensor? h0, Tensor? c0, int cell, bool train, Tensor? w_ih, Tensor w_hh, Tensor? b_ih=None, "
    "Tensor? b_hh=None, Tensor? w_hr=None, Tensor? w_ih_reverse=None, Tensor? w_hh_reverse=None, "
    "Tensor? b_ih_reverse=None, Tensor? b_hh_reverse=None, Tensor? w_hr_reverse=None, Tensor?[]? options=None, "
    "bool want_c_sequence=False, bool deterministic=False, bool tf32=False, int precision=0, int instance=-1) -> "
    "(Tensor y, Tensor h_n, Tensor c_n, Tensor reserve, Tensor c_sequence)";

constexpr const char* kBackwardSchema =
    "backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor reserve, int cell, bool need_dx, "
    "bool need_dstate, bool need_dw_ih, bool need_dw_hh, bool need_db, bool need_dw_hr, Tensor? w_ih, Tensor w_hh, "
    "Tensor? w_hr=None, Tensor? w_ih_reverse=None, Tensor? w_hh_reverse=None, Tensor? w_hr_reverse=None, "
    "Tensor?[]? options=None, int reset_steps=0, Tensor? dc_sequence=None, bool deterministic=False, "
    "bool tf32=False, int precision=0, int instance=-1) -> "
    "(Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh, Tensor dw_hr, "
    "Tensor dw_ih_reverse, Tensor dw_hh_reverse, Tensor db_ih_reverse, Tensor db_hh_reverse, "
    "Tensor dw_hr_reverse, Tensor dreset_h, Tensor dreset_c, Tensor dnorm_hh, Tensor dnorm_c)";

}  // namespace bindings
}  // namespace fused_rnn
