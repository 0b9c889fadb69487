// The contract between the caller and the kernels of one layer: plain structs, no torch, no ownership.
//
// Dimension letters: T time steps, B batch rows, I inputs, H hidden units, P size of h (H, or the projection's size),
// G gates of the cell, D directions (1 or 2), N rows of data (T * B, or the sum of batch_sizes).
//
// The caller allocates every buffer and keeps it alive until the kernels return; the kernels allocate nothing. A
// pointer is to elements of `dtype` in row-major order, and elements of a row are contiguous; strides count elements.
// A pointer is never null and aliases no other one unless its comment says so.
#pragma once

#include <cstdint>

namespace fused_rnn {

enum class CellKind : int32_t { kRnnTanh, kRnnRelu, kLstm, kGru };
namespace cpu {
struct TileUnit;
}

enum class Dtype : int32_t { kFloat32, kFloat64 };
using Bf16 = uint16_t;  // a bfloat16 is the upper half of a float32
// How the weights of a layer are given: as torch has them; or, for inference in float32, as Kernels::freeze packed
// them.
enum class WeightFormat : int32_t { kPlain, kFloat32, kBfloat16, kInt8 };

// Of what numbers the operands of a packed product are: of the layer's dtype, or, made from float32, as cpu/tiles.h
// says.
enum class Operands : int32_t { kPlain, kBfloat16, kDigits3, kDigits4 };

constexpr double kNormEps = 1e-5;  // added to the variance in layer normalisation, as in torch.nn.LayerNorm

// The shape of one layer and the layout of its rows.
//
// The kernels number the rows of [N, ...] buffers by step: row b of step t is row(t) + b. Rows of a packed sequence, or
// of a padded batch with lengths, are sorted so that the longest sequences come first and later steps have fewer rows.
// The caller's own buffers need not be sorted: `places` maps a row number to the row of x, y, c_sequence, resets,
// zones and of their gradients; `order` maps b to the row of h0, c, h_n, the reset states, drop_h and of
// their gradients. The reserve and all other buffers are in the kernels' order.
struct LayerShape {
  CellKind cell;
  Dtype dtype;
  int64_t T, B, I, H, P, N;
  int64_t directions;
  bool projected;              // LSTM with a projection: w_hr is given, and P < H
  bool train;                  // forward fills the reserve for backward
  bool gates_given;            // x already holds W_ih x, [N, D * G*H]; there is no w_ih
  bool drops_h, zones_h;       // Variant::drop_h, Variant::zones.h are given
  bool normalised;             // layer normalisation of W_hh h and, in the LSTM, of c; requires gates_given
  bool deterministic;          // a row's result must not depend on the batch around it: weights are always packed
  Operands operands;           // of packed products
  bool bf16_weights;           // w_ih, w_hh and w_hr, which forward reads, are bfloat16; `dtype` is float32 then
  const cpu::TileUnit* unit;   // the instructions that multiply the operands; null iff they are plain
  WeightFormat weights;        // unless plain, w_ih, w_hh, w_hr and b_ih (which has b_hh, too) are as freeze sets them;
                               // the operands are plain then
  const int64_t* batch_sizes;  // [T] non-increasing, batch_sizes[0] == B; null: every step has B rows
  const int64_t* row_offsets;  // [T] number of rows before step t; null iff batch_sizes is
  const uint8_t* resets;       // [N] 1: the state is replaced before this step; null: no resets
  const int64_t* places;       // [N] see above; null: the identity
  const int64_t* order;        // [B] see above; null: the identity

  bool on_tiles() const { return operands != Operands::kPlain; }
  bool frozen() const { return weights != WeightFormat::kPlain; }
  int64_t rows(int64_t t) const { return batch_sizes ? batch_sizes[t] : B; }
  // Whether h_prev of a step can be the saved h' of the step before it; see Reserve.
  bool chains_h(bool saves_h) const {
    return saves_h && !batch_sizes && !resets && !drops_h && !zones_h && !normalised;
  }
  // Whether a row needs all of its units between two products, so that one thread must have the whole row.
  bool whole_rows() const { return drops_h || normalised; }
  // Whether the state of row b is replaced before its step t, in the order of the direction. The reverse direction
  // restarts at the same borders between steps, so that each part between two borders is a sequence of its own.
  bool reset(int64_t t, int64_t b, bool reverse) const {
    if (!resets) return false;
    if (!reverse) return resets[place(row(t) + b)];
    return t + 1 < T && b < rows(t + 1) && resets[place(row(t + 1) + b)];
  }
  int64_t row(int64_t t) const { return row_offsets ? row_offsets[t] : t * B; }
  int64_t place(int64_t n) const { return places ? places[n] : n; }
  int64_t state(int64_t b) const { return order ? order[b] : b; }
};

// The values of one direction that forward writes for backward, one row for each (t, b). All null in inference.
//
// If LayerShape::chains_h, `gates` and `h_prev` alias: they are one buffer of N + B rows, in which the h' that a step
// saves is the h_prev of the next step.
struct Reserve {
  void* gates;     // [N, kSaved * H] activations that the cell saves; backward reads them
  void* h_prev;    // [N, P] h as W_hh multiplied it (with dropout); the cell's backward and dw_hh read it
  void* c_prev;    // [N, H] c before the step; the cell's backward reads it. LSTM, else null
  void* hidden;    // [N, H] o * tanh(c) before the projection; dw_hr reads it. Null unless projected
  void* h_direct;  // [N, P] h before dropout, for cells that use h outside W_hh h; null unless kUsesH and drops_h
  void* h_hat;     // [N, G*H + 1] W_hh h normalised to mean 0 and variance 1, then its 1 / sqrt(variance + eps); the
                   // backward of the normalisation and dnorm_hh read it. Null unless normalised
  int64_t stride;  // of a row, in all of them
};

// Zoneout of one of the states: the factor of the new state.
struct Zone {
  const void* at;  // [N, size]; null: no zoneout
  int64_t stride;  // of a row; 0: one row for all
};
struct Zones {
  Zone h, c;  // c: LSTM
};

// Regularisation of one direction. Forward and backward read it; each pointer is null where its option is off.
// fused_rnn/reference.py has the equations.
struct Variant {
  const void* drop_h;  // [B, P]
  Zones zones;
  const void* norm_hh;               // [G*H]
  const void *norm_c, *norm_c_bias;  // [H]; LSTM
};

// The states that replace h and c at a reset. Row b of step t begins at element t * step + b * size; a step of 0 gives
// every time step the same states. Forward reads them; null means zeros. In backward these are the gradients: the
// kernels add to them, so the caller zeroes them first; null means that they are not needed.
struct ResetState {
  void* h;                 // [B, P], or [B, P] at every step
  void* c;                 // [B, H], or [B, H] at every step; LSTM
  int64_t step_h, step_c;  // elements between two time steps
};

struct ForwardDirection {
  const void* x;     // [N, I]; with gates_given [N, G*H] in rows D * G*H apart
  const void* w_ih;  // [G*H, I]; null with gates_given
  const void* w_hh;  // [G*H, P]
  const void* b_ih;  // [G*H]; null: zeros
  const void* b_hh;  // [G*H]; null: zeros
  const void* w_hr;  // [P, H]; null unless projected
  const void* h0;    // [B, P]; null: zeros
  ResetState reset;  // read only
  Variant variant;
  Reserve reserve;   // out
  void* y;           // [N, P] out: h of every step, which the next step reads
  int64_t y_stride;  // of a row of y: D * P, so that the two directions interleave
  void* c_sequence;  // [N, H] out: c of every step, in rows D * H apart; null: not needed. LSTM
  void* h_n;        // [B, P] out: h after each row's last step, written after all steps; may alias h0; null: not needed
  void* c;          // [B, H] in: c0, updated at every step, out: c_n. LSTM, else null
  void* workspace;  // forward_workspace(shape) elements, 64-byte aligned; contents need not be kept
};

struct ForwardParams {
  LayerShape shape;
  ForwardDirection direction[2];  // [1] runs from each row's last step to its first
};

// Buffers marked "chunk" hold the rows of one chunk of steps (BackwardParams::accumulate); the gradients of the inputs
// and weights read them after the chunk's last step, and the next chunk overwrites them.
struct BackwardDirection {
  const void* x;            // [N, I] read by dw_ih; may be null without it
  const void* w_ih;         // [G*H, I] read by dx; may be null without it, and is with gates_given
  const void* w_hh;         // [G*H, P]
  const void* w_hr;         // [P, H]; null unless projected
  const void* dy;           // [N, P]; null: zeros
  int64_t dy_stride;        // of a row of dy: D * P
  const void* dh_n;         // [B, P]; may alias dh0; null: zeros
  const void* dc_sequence;  // [N, H] in rows D * H apart; null: zeros. LSTM
  Variant variant;          // as in forward
  Reserve reserve;          // as forward left it; read only
  void* dgates;             // [N, kGrads * H] out, chunk: gradients of the gates before their activations
  void* dproduct;           // [N, G*H] out, chunk: gradient of W_hh h before its normalisation; null unless normalised
  void* dnormal;            // [N, 2 * H] out, chunk: each row's gradient of norm_c, then of norm_c_bias; null without
                            // norm_c
  void* dh_total;           // [N, P] out, chunk: gradient of h after the projection; null unless projected
  void* dh0;                // [B, P] out; may alias dh_n; null: not needed
  void* dh_chunk;           // [B, P] gradient of h between two chunks; null if there is one chunk
  void* dc;                 // [B, H] in: gradient of c_n, updated at every step, out: gradient of c0. LSTM, else null
  ResetState dreset;        // added to
  void* dw_ih;              // [G*H, I] out; null: not needed, as for all that follow but the workspace
  void* dw_hh;              // [G*H, P] out
  void* db_ih;              // [G*H] out; null iff db_hh is
  void* db_hh;              // [G*H] out
  void* dw_hr;              // [P, H] out
  void* dnorm_hh;           // [G*H] out
  void* dnorm_c;            // [2 * H] out: gradients of norm_c and of norm_c_bias; needs dnorm_hh
  void* workspace;          // backward_workspace(shape) elements, 64-byte aligned; keeps packed weights between chunks
};

struct BackwardParams {
  LayerShape shape;
  BackwardDirection direction[2];
  bool accumulate;  // false for the first chunk. Later chunks find the weights packed, and add to their gradients
  void* dx;         // [N, I] out: the sum over both directions; null: not needed. With gates_given [N, D * G*H]
  void* workspace;  // gradients_workspace(shape) elements for each thread, 64-byte aligned; may alias the directions'
                    // workspaces if there is one chunk
};

}  // namespace fused_rnn
