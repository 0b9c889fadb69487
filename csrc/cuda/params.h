// The contract between the host and the CUDA kernels: plain structs, no torch, no ownership.
//
// The dimension letters are those of rnn_params.h. The caller allocates all buffers on the device of the launch and
// keeps them until the kernel has ended; the kernels allocate nothing. Elements are of the layer's type (bf16, fp16, or
// float for TF32) unless a comment says otherwise. Arrays are row-major and contiguous unless there is a stride. A
// pointer is never null and aliases no other one unless its comment says so.
//
// Hp is H rounded up to a whole number of 16-byte loads. The rows that blocks exchange are Hp wide, with zeros from H
// on, and so are the rows of the recurrent weights.
#pragma once

#include "../rnn_params.h"

namespace fused_rnn {
namespace cuda {

// How blocks share a layer. The index of a block counts parts first, then teams, then directions. A team has one copy
// of the recurrent weights, of which each part holds the rows of some units. It computes every teams-th tile of batch
// rows.
struct Division {
  int parts;
  int teams;  // in each direction
  int tiles;  // of batch rows that one team computes in turn at every step
};

struct Sequence {
  int64_t T, B;
  int64_t first_row, last_row;  // this launch's part of the batch
  int H;
  int directions;
  Division division;
  const int32_t* lengths;  // [B] number of steps of each row, 0..T; null: all T
  const uint8_t* resets;   // [T, B] 1: a sequence begins before this step; null: no resets. At a direction's first step
                           // the kernels ignore it: the host replaces h0 and c0 itself
  bool has_options;        // lengths, resets, dropout or zoneout; set at the launch. One branch skips all of them
  int32_t* error;          // in host memory; a block whose wait times out sets it to 1
  uint64_t patience;       // timeout of a wait, in nanoseconds
};

// The states that replace h and c at the resets of step t, at element t * step. Forward reads them; null means zeros.
// In backward these are the gradients, written only where there is a reset; null means that they are not needed.
struct ResetState {
  void* h;       // [B, H]
  void* c;       // [B, H]; LSTM
  int64_t step;  // 0: the same states at every step
};

struct ForwardDirection {
  const void* x_gates;  // [T, B, G*H] W_ih x
  const void* w_hh;     // [G*H, Hp]
  const void* b_ih;     // [G*H]; null: zeros
  const void* b_hh;     // [G*H]; null: zeros
  const void* h0;       // [B, H]; null: zeros
  const void* c0;       // [B, H]; null: zeros. LSTM
  ResetState reset;     // read only
  const void* drop_h;   // [B, H] recurrent dropout: the factor of h in W_hh h; null: ones
  Zones zones;          // [T, B, H]
  void* h_prev;      // [T, B, Hp] out: h * drop_h as W_hh multiplied it at each step; dw_hh and the backward of the GRU
                     // read it. With kThroughL2 the blocks exchange h through it: the caller fills it with kNotReady
                     // first. With the other exchanges it may be null in inference. See also `ring`
  void* y;           // [T, B, H] out: h of every step, zero beyond a row's length
  int64_t y_stride;  // of a row of y: D * H
  void* c_sequence;  // [T, B, H] out: c of every step, in rows y_stride apart; null: not needed. LSTM
  void* h_n;         // [B, H] out
  void* c_n;         // [B, H] out; LSTM
  void* saved;       // [T, B, kSaved*H] out: the cell's saved values, which backward reads; null in inference
  float* state_prev;  // [T, B, H] out: the state before each step that backward reads and h_prev does not have: c of
                      // the LSTM, h of the GRU with drop_h; null for other cells and in inference
};

struct ForwardParams {
  Sequence sequence;
  ForwardDirection direction[2];  // [1] runs from each row's last step to its first
  int32_t ring = -1;  // kRingSteps - 1: h_prev is [kRingSteps, B, Hp], and its rows serve every kRingSteps-th step.
                      // Only with kThroughL2, in inference
};

struct BackwardDirection {
  const void* w_hh_t;       // [H, G*Hp] W_hh^T, with columns in the order of the gates of W_hh h in dgates
  const void* h_prev;       // as forward left it; only the GRU reads it, for other cells it may be null
  const void* saved;        // as forward left it
  const float* state_prev;  // as forward left it
  const void* drop_h;       // as in forward
  Zones zones;              // as in forward
  const void* dy;           // [T, B, H]; null: zeros
  int64_t dy_stride;        // of a row of dy: D * H
  const void* dc_sequence;  // [T, B, H] in rows dy_stride apart; null: zeros. LSTM
  const void* dh_n;         // [B, H]; null: zeros
  const void* dc_n;         // [B, H]; null: zeros. LSTM
  ResetState dreset;        // [T, B, H] out; the caller zeroes it first
  void* dgates;  // [T, B, kGrads*Hp] out: gate gradients, which the caller multiplies into those of weights and
                 // input. With kThroughL2 and kSplitColumns the blocks exchange them here: the caller fills it with
                 // kNotReady
  void* dh0;     // [B, H] out; null: not needed
  void* dc0;     // [B, H] out; null: not needed. LSTM
};

struct BackwardParams {
  Sequence sequence;
  BackwardDirection direction[2];
};

// One time step of one direction, for layers whose recurrent weights do not fit on the chip: a library computes the
// matrix products, and these kernels the rest of the step. Rows are H wide, without padding. Elements may also be
// float64. "Arithmetic" elements are double for float64 and float for all other types. Rows that have ended keep h, c
// and their gradients.

// The resets at the border between two neighbouring steps.
struct StepResets {
  const uint8_t* at;  // [B]; null: no resets
  int64_t t;          // the later of the two steps; rows that have ended before it are not reset
};

struct StepForwardParams {
  int64_t t, B;
  int H;
  const int32_t* lengths;  // as in Sequence
  const void* x_gates;     // [B, G*H]
  const void* h_gates;     // [B, G*H] W_hh h
  const void* b_ih;        // [G*H]; null: zeros
  const void* b_hh;        // [G*H]; null: zeros
  const void* drop_h;      // [B, H]; null: ones
  Zones zones;             // of this step
  const void* h_prev;      // [B, H] the h (times drop_h) that gave h_gates
  void* h;                 // [B, H] out: the h (times drop_h) that W_hh multiplies at the next step
  void* kept_h;            // [B, H] Arithmetic, in and out: h without drop_h; null without drop_h
  void* c;                 // [B, H] Arithmetic, in and out; LSTM
  void* y;                 // [B, H] out, zero beyond a row's length
  int64_t y_stride;
  void* c_sequence;   // [B, H] out, in rows y_stride apart; null: not needed. LSTM
  StepResets resets;  // between this step and the next
  ResetState reset;   // the states of the next step's resets; `step` is not used
  void* saved;        // [B, kSaved*H] out, as in ForwardDirection; null in inference
  void* state_prev;   // [B, H] Arithmetic out, as in ForwardDirection; may be null
};

// "Next" is meant in forward's order: backward has computed the next step before this one.
struct StepBackwardParams {
  int64_t t, B;
  int H;
  const int32_t* lengths;   // as in Sequence
  const void* saved;        // [B, kSaved*H] as forward left it
  const void* h_prev;       // [B, H] as forward read it
  const void* drop_h;       // [B, H]; null: ones
  Zones zones;              // of this step
  const void* state_prev;   // [B, H] Arithmetic, as forward left it
  const void* dy;           // [B, H]; null: zeros
  int64_t dy_stride;        // of a row of dy
  const void* dc_sequence;  // [B, H] in rows dy_stride apart; null: zeros. LSTM
  StepResets resets;        // between this step and the next
  ResetState dreset;        // [B, H] out: gradients of the states of the next step's resets; `step` is not used
  const void* product;      // [B, H] W_hh^T times the gate gradients of the next step; null if this is the last step
  void* dh;                 // [B, H] Arithmetic, in and out: the gradient of h without the product
  void* dc;                 // [B, H] Arithmetic, in and out: the gradient of c. LSTM
  void* dgates;             // [B, kGrads*H] out
  void* dh0;  // [B, H] out. Given only in a call after the first step, which computes the gradient of h0 and nothing
              // else; null otherwise
};

// Layer normalisation of a step, in addition to StepForwardParams or StepBackwardParams.
struct StepNorms {
  const void* gain_h;  // [G*H] gain of W_hh h; null: not normalised
  const void* gain_c;  // [H] gain of c; null: not normalised. LSTM
  const void* bias_c;  // [H]; null: zeros
  double eps;          // added to the variance
  void* statistics;  // [B, 4] Arithmetic: mean and 1 / sqrt(variance + eps) of W_hh h, then those of c. Forward writes
                     // them, backward reads them
};

struct NormalisedForwardParams {
  StepForwardParams step;
  StepNorms norms;
  void* scratch;  // [B, 2*H] Arithmetic: c and o of a row; used only with gain_c
};

struct NormalisedBackwardParams {
  StepBackwardParams step;  // dh0 is null
  StepNorms norms;
  const void* h_gates;  // [B, G*H] as forward read it; used only with gain_h, as the next two
  void* dh_gates;       // [B, G*H] out: the gradient of h_gates, which the library multiplies by W_hh
  void* dgain_h;        // [B, G*H] Arithmetic, added to: each row's part of the gradient of gain_h
  void* dnorm_c;  // [B, 2*H] Arithmetic, added to: each row's parts of the gradients of gain_c and bias_c; used only
                  // with gain_c
};

}  // namespace cuda
}  // namespace fused_rnn
