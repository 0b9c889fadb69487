// The contract between whoever launches a kernel and the kernels: plain structs, no torch, no ownership.
//
// Dimension letters: T time steps, B batch rows, I input, H hidden units, P size of h (H, or the projection's size),
// G gates of the cell, D directions (1 or 2), N rows of data (T * B, or the sum of batch_sizes).
// Pointers are to elements of `dtype`, row-major; strides are in elements; every row's last dimension is contiguous.
// "may be null" is said where it holds; no two pointers alias unless said.
#pragma once

#include <cstdint>

namespace fused_rnn {

enum class CellKind : int32_t { kRnnTanh, kRnnRelu, kLstm, kGru };
enum class Dtype : int32_t { kFloat32, kFloat64 };

constexpr double kNormEps = 1e-5;  // that layer normalisation adds to a variance; torch.nn.LayerNorm's default

// The shape of one layer and the place of its rows.
// Row (t, b) of every [N, ...] buffer is row(t) + b; a packed sequence has fewer rows at later steps. What the caller
// hands in and gets may lie elsewhere, as in a padded batch whose rows are worked on longest first: `places` says where
// the rows of x, y, c_sequence, resets and of their gradients are, `order` where those of the states are.
struct LayerShape {
  CellKind cell;
  Dtype dtype;
  int64_t T, B, I, H, P, N;
  int64_t directions;
  bool projected;              // LSTM with a projection: P < H, W_hr present
  bool train;                  // forward fills the reserve, for backward
  bool gates_given;            // x is W_ih x already, [N, D * G*H], and there is no W_ih
  bool drops_h, zones_h;       // recurrent dropout, zoneout of h; see Variant
  bool normalised;             // layer normalisation; only with gates_given
  bool deterministic;          // a row's sums run in the same order whatever stands beside it: weights always packed
  const int64_t* batch_sizes;  // [T] non-increasing, batch_sizes[0] == B; null: every step has B rows
  const int64_t* row_offsets;  // [T] rows before step t; null with batch_sizes
  const uint8_t* resets;       // [N] 1: the state is replaced before this step; null: nowhere
  const int64_t* places;       // [N] where row n lies; null: at n
  const int64_t* order;        // [B] where row b of the states (h0, c, h_n, reset and their gradients) lies; null: at b

  int64_t rows(int64_t t) const { return batch_sizes ? batch_sizes[t] : B; }
  bool chains_h(bool saves_h) const {
    return saves_h && !batch_sizes && !resets && !drops_h && !zones_h && !normalised;
  }
  // Whether a row's units need each other between two products: then they are one thread's.
  bool whole_rows() const { return drops_h || normalised; }
  // Whether the walk along a direction replaces the state of row b before step t. The reverse direction starts anew at
  // the same borders, so that what lies between them is a sequence of its own.
  bool reset(int64_t t, int64_t b, bool reverse) const {
    if (!resets) return false;
    if (!reverse) return resets[place(row(t) + b)];
    return t + 1 < T && b < rows(t + 1) && resets[place(row(t + 1) + b)];
  }
  int64_t row(int64_t t) const { return row_offsets ? row_offsets[t] : t * B; }
  int64_t place(int64_t n) const { return places ? places[n] : n; }
  int64_t state(int64_t b) const { return order ? order[b] : b; }
};

// What forward keeps for backward, one row per (t, b), `stride` apart. All null in inference.
// Where a cell keeps h' itself and every step has B rows, `gates` is `h_prev` moved by one step: one buffer of N + B
// rows.
struct Reserve {
  void* gates;     // [N, kSaved * H] what the cell saves
  void* h_prev;    // [N, P] h as the step consumed it
  void* c_prev;    // [N, H] c as the step consumed it; LSTM, else null
  void* hidden;    // [N, H] o * tanh(c) before the projection; null unless projected
  void* h_direct;  // [N, P] h before dropout, where a cell uses it besides (h_prev is what W_hh multiplied); else null
  void* h_hat;     // [N, G*H] W_hh h of mean 0 and variance 1, and behind it what it was divided by to be so, inverted;
                   // null unless normalised
  int64_t stride;  // of a row, in all of them
};

// Regularisation of one direction, all null without; reference.py has the equations.
struct Variant {
  const void* drop_h;                    // [B, P]
  const void* zone_h;                    // [N, P]
  const void* zone_c;                    // [N, H]; LSTM
  int64_t zone_h_stride, zone_c_stride;  // of a row; 0: the same for all
  const void* norm_hh;                   // [G*H]
  const void *norm_c, *norm_c_bias;      // [H]; LSTM
};

// What replaces the state at a reset: null zeros, else row b of step t at t * step + b rows; step 0: the same at every
// step. In backward out: added to, zero before; null: not wanted.
struct ResetState {
  void* h;                 // [B, P] or [T, ..., B, P]
  void* c;                 // the same of size H; LSTM
  int64_t step_h, step_c;  // elements between time steps
};

struct ForwardDirection {
  const void* x;     // [N, I]; with gates_given [N, G*H], rows D * G*H apart
  const void* w_ih;  // [G*H, I], null with gates_given
  const void* w_hh;  // [G*H, P]
  const void* b_ih;  // [G*H], may be null: zeros
  const void* b_hh;  // [G*H], may be null: zeros
  const void* w_hr;  // [P, H], null unless projected
  const void* h0;    // [B, P], may be null: zeros
  ResetState reset;  // read only
  Variant variant;
  Reserve reserve;
  void* y;           // [N, P] out: h of every step
  int64_t y_stride;  // of a row of y: D * P, so that two directions interleave
  void* c_sequence;  // [N, H] out: c of every step, rows D * H apart; may be null: not wanted. LSTM
  void* h_n;         // [B, P] out: h after each row's last step; may be h0; may be null: not wanted
  void* c;           // [B, H] in: c0; out: c_n. LSTM, else null
  void* workspace;   // forward_workspace(shape) elements, 64-byte aligned
};

struct ForwardParams {
  LayerShape shape;
  ForwardDirection direction[2];  // [1] runs from each row's last step to its first
};

struct BackwardDirection {
  const void* x;            // [N, I], null if dw_ih is
  const void* w_ih;         // [G*H, I], null if dx is
  const void* w_hh;         // [G*H, P]
  const void* w_hr;         // [P, H], null unless projected
  const void* dy;           // [N, P], may be null: zeros
  int64_t dy_stride;        // of a row of dy: D * P
  const void* dh_n;         // [B, P], may be null: zeros; may be dh0
  const void* dc_sequence;  // [N, H], rows D * H apart; may be null: zeros. LSTM
  Variant variant;
  Reserve reserve;  // as forward left it; read only
  void* dgates;     // [N, kGrads * H] out: gradients before the activations, of a chunk's rows; so the next three
  void* dproduct;   // [N, G*H] out: gradients of W_hh h behind its normalisation; null unless normalised
  void* dnormal;    // [N, 2 * H] out: of norm_c times its factor, and of norm_c_bias; null without norm_c
  void* dh_total;   // [N, P] out: gradient of h after the projection; null unless projected
  void* dh0;        // [B, P] out, may be null: not wanted
  void* dh_chunk;   // [B, P] gradient of h between two chunks of steps; null if there is one
  void* dc;         // [B, H] in: gradient of c_n; out: gradient of c0. LSTM, else null
  ResetState dreset;
  void* dw_ih;      // [G*H, I] out, may be null: not wanted; so the others
  void* dw_hh;      // [G*H, P] out
  void* db_ih;      // [G*H] out
  void* db_hh;      // [G*H] out
  void* dw_hr;      // [P, H] out
  void* dnorm_hh;   // [G*H] out
  void* dnorm_c;    // [2 * H] out: of norm_c and norm_c_bias
  void* workspace;  // backward_workspace(shape) elements, 64-byte aligned
};

struct BackwardParams {
  LayerShape shape;
  BackwardDirection direction[2];
  bool goes_on;     // from the steps behind, backward's own: panels are packed, gradients of weights added to
  void* dx;         // [N, I] out: the sum over directions; may be null: not wanted. With gates_given [N, D * G*H]
  void* workspace;  // gradients_workspace(shape) elements for each thread, 64-byte aligned; may be the directions' own
                    // if there is one chunk
};

}  // namespace fused_rnn
