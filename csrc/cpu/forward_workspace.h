// What forward decides about a layer before its first step, and its workspace.
#pragma once

#include "pack.h"
#include "rounded_rows.h"
#include "tile_operands.h"
#include "worker.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// How forward multiplies by each weight. Weights that come packed (LayerShape::weights) are as if it had packed them.
struct ForwardProducts {
  bool packed_x, packed_h;  // whether W_ih, and whether W_hh and W_hr, are packed into panels
  bool x_beforehand;        // whether W_ih x of all steps is known before the first step: computed, or given

  explicit ForwardProducts(const LayerShape& s)
      : packed_x(!s.gates_given && (always(s) || s.N >= rows_worth_transposing(s, s.I))),
        packed_h(always(s) || (s.N >= rows_worth_transposing(s, s.P) && (s.B > 1 || kWide || s.on_tiles()))),
        x_beforehand(s.gates_given || (s.T > 1 && s.B < few_rows(s))) {}

 private:
  // One row reads W_hh as fast as it lies, unless vectors are long (64 bytes, of float32 and float64): packing saves
  // the sum over the lanes of each result.
  static constexpr bool kWide = kLanes<float> >= 16;

  // bfloat16 weights are the tiles' operands already and cheap to pack; but reading them for a single row is cheaper.
  static bool always(const LayerShape& s) {
    const bool are_operands = s.bf16_weights && s.on_tiles() && s.N > 1;
    return s.frozen() || s.deterministic || are_operands || cpu::digits_of(s.operands);
  }
  // Below so many rows, x of several steps fills tiles that x of one step leaves half empty. With 16 registers, whose
  // tiles have three rows, more rows pay where W_ih is large, because it is then read less often.
  static int64_t few_rows(const LayerShape& s) {
    constexpr int64_t kTile = kTileRows<4>;
    if (kTile > 3) return kTile;
    if (!s.frozen()) return s.H * s.I >= 1 << 16 ? 8 : kTile;
    return s.weights == WeightFormat::kFloat32 && s.H * s.I >= 1 << 14 ? 6 : kTile;
  }
  static int64_t rows_worth_transposing(const LayerShape& s, int64_t K) {
    return s.dtype == Dtype::kFloat32 ? FUSED_RNN_ISA::rows_worth_transposing<float>(K, s.B)
                                      : FUSED_RNN_ISA::rows_worth_transposing<double>(K, s.B);
  }
};

// Offsets of the parts of a direction's workspace, in elements.
template <class Cell, class T>
struct ForwardWorkspace {
  int64_t recurrent, input, bias, projection, hidden, zeros, dropped, products, outputs, x_product;
  int64_t split_x, split_h, split_hidden, size;

  explicit ForwardWorkspace(const LayerShape& s) {
    const ForwardProducts products(s);
    const int64_t block = kUnitVectors<Cell::kGates> * kLanes<T>;
    const int64_t h_panels = products.packed_h ? panels<Cell::kGates>(s, s.H, s.P) : 0;
    const int64_t x_panels = products.packed_x ? panels<Cell::kGates>(s, s.H, s.I) : 0;
    recurrent = 0;
    input = products.x_beforehand ? recurrent : recurrent + h_panels;  // W_hh is packed after the last use of W_ih
    bias = products.x_beforehand && h_panels > x_panels ? recurrent + h_panels : input + x_panels;
    projection = bias + (s.frozen() ? 0 : ceil_div(s.H, block) * block * Cell::kGates * 2);
    hidden = projection + (s.projected && products.packed_h ? panels<1>(s, s.P, s.H) : 0);
    zeros = hidden + (s.projected ? s.B * s.H : 0);
    dropped = zeros + s.P;
    this->products = dropped + (s.drops_h ? s.B * s.P : 0);
    outputs = this->products + (s.normalised ? s.B * Cell::kGates * s.H : 0);
    x_product = outputs + (s.normalised && Cell::kHasC ? s.B * 2 * s.H : 0);
    split_x = x_product + (products.x_beforehand && !s.gates_given && !s.train ? s.N * Cell::kGates * s.H : 0);
    split_x = ceil_div(split_x, 16) * 16;
    split_h = split_x + (products.packed_x ? operand(s, rows_of_x(s, products), s.I) : 0);
    split_hidden = split_h + (products.packed_h ? operand(s, s.B, s.P) : 0);
    size = split_hidden + (products.packed_h && s.projected ? operand(s, s.B, s.H) : 0);
  }

  // Rows of x that are multiplied at once.
  static int64_t rows_of_x(const LayerShape& s, const ForwardProducts& products) {
    return products.x_beforehand ? s.N : s.B;
  }
  // Elements of rows that are split or rounded before a product.
  static int64_t operand(const LayerShape& s, int64_t rows, int64_t K) {
    if (s.weights == WeightFormat::kInt8) return RoundedRows::size(rows, K);
    return s.on_tiles() ? SplitRows::size(rows, K, s.operands) : 0;
  }
  // Elements of W [G * H, K], packed; none if it comes packed.
  template <int G>
  static int64_t panels(const LayerShape& s, int64_t H, int64_t K) {
    if (s.frozen()) return 0;
    if (!s.on_tiles()) return G * in_vectors<T>(H) * K;
    constexpr int64_t units = kUnitVectors<G> * kLanes<T>;
    return ceil_div(H, units) * SplitPanel::size(K, G * units, s.operands);
  }
};

// The rows that a worker splits, or rounds, before it multiplies them: of x, all at once or step by step; of h; and of
// what the projection multiplies.
template <class Rows>
struct SplitOperands {
  Rows x, h, hidden;

  SplitOperands() = default;
  template <class Workspace>
  SplitOperands(const LayerShape& s, const ForwardProducts& products, const Workspace& part, float* workspace,
                const cpu::Worker& worker) {
    const auto begin = [&](int64_t rows) { return worker.splits_units ? 0 : worker.begin(rows); };
    const auto end = [&](int64_t rows) { return worker.splits_units ? rows : worker.end(rows); };
    const int64_t rows = part.rows_of_x(s, products);
    x = Rows(workspace + part.split_x, rows, begin(rows), end(rows), s.I, s.operands, cpu::kMostOfGates);
    const float most_of_h = s.cell == CellKind::kRnnRelu ? cpu::kMostOfGates : __builtin_inff();  // else 1, about
    h = Rows(workspace + part.split_h, s.B, begin(s.B), end(s.B), s.P, s.operands, most_of_h);
    hidden = Rows(workspace + part.split_hidden, s.B, begin(s.B), end(s.B), s.H, s.operands);
  }
};

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
