// The contract between the host and the CUDA kernels: plain structs, no torch, no ownership.
//
// Dimension letters as in rnn_params.h. `Stored` is uint16_t (bf16, fp16) or float (TF32). Hp is H rounded up to whole
// 16-byte loads: rows of what blocks exchange are Hp wide, and what lies between H and Hp is zero. Everything is
// row-major and contiguous unless a stride says otherwise; no two pointers alias.
#pragma once

#include <cstdint>

namespace fused_rnn {
namespace cuda {

// How blocks share a layer. Blocks are numbered part fastest, then team, then direction. A team holds one copy of the
// recurrent weights, each part the rows of some units, and takes every teams-th tile of batch rows.
struct Division {
  int parts;
  int teams;  // of each direction
  int tiles;  // of batch rows that one team takes in turn at every step
};

struct Sequence {
  int64_t T, B;
  int64_t first_row, last_row;  // this launch's part of the batch
  int H;
  int directions;
  Division division;
  const int32_t* lengths;  // [B] steps of each row, 0..T; null: all T
  const uint8_t* resets;   // [T, B] 1: a sequence begins before this step; null: nowhere. The host itself replaces the
                           // states of the direction's first step
  int32_t* error;          // in host memory; set to 1 by a block that has waited in vain
  uint64_t patience;       // nanoseconds after which waiting is in vain
};

// What replaces the states at resets, of step t at t * step elements; null: zeros (in backward: not wanted).
struct ResetState {
  void* h;       // [B, H]
  void* c;       // [B, H]; LSTM
  int64_t step;  // 0: the same at every step
};

// Zoneout (fused_rnn/reference.py) of one of the states: what share of the new state each row takes.
struct Zone {
  const void* at;  // [T, B, H]; null: all of it
  int64_t stride;  // of a row; 0: the same for all
};

struct ForwardDirection {
  const void* x_gates;  // [T, B, G*H] W_ih x
  const void* w_hh;     // [G*H, Hp]
  const void* b_ih;     // [G*H], may be null: zeros
  const void* b_hh;     // [G*H], may be null: zeros
  const void* h0;       // [B, H], may be null: zeros
  const void* c0;       // [B, H], may be null: zeros; LSTM
  ResetState reset;     // read only
  const void* drop_h;   // [B, H] what h is multiplied by before W_hh, may be null: ones
  Zone zone_h, zone_c;  // zone_c: LSTM
  void* h_prev;         // [T, B, Hp] out: h, times drop_h, as each step multiplied it. The exchange through L2, all
                        // kNotYet before; where that goes another way, it may be null
  void* y;              // [T, B, H] out, zero behind a row's end
  int64_t y_stride;     // of a row of y: D * H
  void* c_sequence;     // [T, B, H] out, c of every step, rows y_stride apart; may be null: not wanted. LSTM
  void* h_n;            // [B, H] out
  void* c_n;            // [B, H] out; LSTM
  void* saved;          // [T, B, kSaved*H] out, for backward; null in inference
  float* state_prev;    // [T, B, H] out, the state before each step that backward asks for and h_prev does not hold: c;
                        // h of the GRU with drop_h. Null in inference and where there is none
};

struct ForwardParams {
  Sequence sequence;
  ForwardDirection direction[2];  // [1] runs from each row's last step to its first
};

struct BackwardDirection {
  const void* w_hh_t;       // [H, G*Hp] columns as in dgates
  const void* h_prev;       // as forward left it; GRU, else may be null
  const void* saved;        // as forward left it
  const float* state_prev;  // as forward left it
  const void* drop_h;       // as forward had it, and the two below
  Zone zone_h, zone_c;
  const void* dy;           // [T, B, H], may be null: zeros
  int64_t dy_stride;        // of a row of dy: D * H
  const void* dc_sequence;  // [T, B, H], rows dy_stride apart, may be null: zeros
  const void* dh_n;         // [B, H], may be null: zeros
  const void* dc_n;         // [B, H], may be null: zeros
  ResetState dreset;        // [T, B, H] out, where there is a reset; zero before
  void* dgates;             // [T, B, kGrads*Hp] out; the exchange through L2, all kNotYet before
  void* dh0;                // [B, H] out, may be null: not wanted
  void* dc0;                // [B, H] out, may be null: not wanted
};

struct BackwardParams {
  Sequence sequence;
  BackwardDirection direction[2];
};

// One time step of one direction where the weights do not stay: their product is a library's, the rest is these. H is
// not padded; `Arithmetic` is double for float64, else float. Rows that have ended keep h, c and their gradients.

// The resets at one border between two steps.
struct StepResets {
  const uint8_t* at;  // [B]; null: none
  int64_t t;          // the later step of the two: rows that have ended before it have no border there
};

struct StepForwardParams {
  int64_t t, B;
  int H;
  const int32_t* lengths;  // as in Sequence
  const void* x_gates;     // [B, G*H]
  const void* h_gates;     // [B, G*H] W_hh h
  const void* b_ih;        // [G*H], may be null
  const void* b_hh;        // [G*H], may be null
  const void* drop_h;      // [B, H], may be null
  Zone zone_h, zone_c;     // of this step
  const void* h_prev;      // [B, H], what was multiplied
  void* h;                 // [B, H] out, what the step after multiplies
  void* kept_h;            // [B, H] Arithmetic, h itself, in and out; with drop_h, else null
  void* c;                 // [B, H] Arithmetic, in and out; LSTM
  void* y;                 // [B, H] out, zero behind a row's end
  int64_t y_stride;
  void* c_sequence;   // [B, H] out, rows y_stride apart; may be null
  StepResets resets;  // at the step after
  ResetState reset;   // of the step after: step is unused
  void* saved;        // [B, kSaved*H] out, may be null
  void* state_prev;   // [B, H] Arithmetic out, may be null
};

struct StepBackwardParams {
  int64_t t, B;
  int H;
  const int32_t* lengths;
  const void* saved;   // [B, kSaved*H]
  const void* h_prev;  // [B, H]
  const void* drop_h;  // [B, H], may be null
  Zone zone_h, zone_c;
  const void* state_prev;  // [B, H] Arithmetic, as forward left it
  const void* dy;          // [B, H], may be null
  int64_t dy_stride;
  const void* dc_sequence;  // [B, H], rows dy_stride apart, may be null
  StepResets resets;        // between this step and the one after
  ResetState dreset;        // [B, H] out, of the step after: step is unused
  const void* product;      // [B, H] W_hh^T times the gates' gradients of the step after; null at the last step
  void* dh;                 // [B, H] Arithmetic, in and out: what reaches h other than through the product
  void* dc;                 // [B, H] Arithmetic, in and out; LSTM
  void* dgates;             // [B, kGrads*H] out
  void* dh0;                // [B, H] out, behind the last step: then all that is done; else null
};

// Layer normalisation of a step, on top of the step's own.
struct StepNorms {
  const void* gain_h;  // [G*H] of W_hh h, may be null: not normalised
  const void* gain_c;  // [H], may be null; LSTM
  const void* bias_c;  // [H], may be null: zeros
  double eps;
  void* statistics;  // [B, 4] Arithmetic: of W_hh h, then of c, the mean and the deviation's inverse; out of forward
};

struct NormalisedForwardParams {
  StepForwardParams step;
  StepNorms norms;
  void* scratch;  // [B, 2*H] Arithmetic; with gain_c
};

struct NormalisedBackwardParams {
  StepBackwardParams step;  // dh0 is null
  StepNorms norms;
  const void* h_gates;  // [B, G*H] as forward had it; with gain_h
  void* dh_gates;       // [B, G*H] out, its gradient: what W_hh^T is to multiply; with gain_h
  void* dgain_h;        // [B, G*H] Arithmetic, in and out: each row's part of the gradient; with gain_h
  void* dnorm_c;        // [B, 2*H] Arithmetic, in and out: the same of gain_c and bias_c; with gain_c
};

}  // namespace cuda
}  // namespace fused_rnn
