// The layers of kernel_check.cpp, their inputs and results, and the plain reference in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/rnn_params.h"

namespace fused_rnn {
namespace check {

enum : int { kX, kH0, kC0, kDy, kDhN, kDcN, kStates };
enum : int { kWih, kWhh, kBih, kBhh, kWhr, kWeights };
const char* const kResultNames[] = {"dx", "dh0", "dc0", "y", "h_n", "c_n"};
const char* const kGradientNames[] = {"dw_ih", "dw_hh", "db_ih", "db_hh", "dw_hr"};

// flags: '2' directions, 'b'iases, initial 's'tates and their gradients, 'p'acked rows, gradients from the 'f'inal
// states only, included in --'q'uick.
struct Case {
  const char* cells;  // 't'anh, 'r'elu, 'l'stm, 'g'ru
  int64_t T, B, I, H, projection;
  const char* flags;
  bool has(char flag) const { return std::strchr(flags, flag) != nullptr; }
};

struct Layer {
  LayerShape shape{};
  int64_t G, saved, grads;
  bool lstm, biases, states, only_final;
  std::vector<int64_t> batch_sizes, row_offsets;
  std::string name;

  Layer(const Case& c, char cell) : lstm(cell == 'l'), biases(c.has('b')), states(c.has('s')), only_final(c.has('f')) {
    const CellKind kinds[] = {CellKind::kRnnTanh, CellKind::kRnnRelu, CellKind::kLstm, CellKind::kGru};
    const char* const names[] = {"rnn_tanh", "rnn_relu", "lstm", "gru"};
    const int64_t kind = std::strchr("trlg", cell) - "trlg", P = c.projection ? c.projection : c.H;
    G = cell == 'l' ? 4 : cell == 'g' ? 3 : 1;
    saved = grads = G == 1 ? 1 : 4;
    shape = {kinds[kind], Dtype::kFloat32, c.T, c.B, c.I, c.H, P, c.T * c.B};
    shape.directions = c.has('2') ? 2 : 1;
    shape.projected = c.projection > 0;
    if (c.has('p')) {
      shape.N = 0;
      for (int64_t t = 0; t < c.T; ++t) {
        row_offsets.push_back(shape.N);
        batch_sizes.push_back(std::max<int64_t>(1, c.B - c.B * t * t / (c.T * c.T)));
        shape.N += batch_sizes.back();
      }
      shape.batch_sizes = batch_sizes.data(), shape.row_offsets = row_offsets.data();
    }
    name = names[kind];
    const int64_t sizes[] = {c.T, c.B, c.I, c.H, P};
    for (int i = 0; i < 5; ++i) name += std::string(" ") + "TBIHP"[i] + "=" + std::to_string(sizes[i]);
    name += std::string(" flags=") + c.flags;
  }
  Layer(const Layer&) = delete;

  int64_t size(int i) const {
    const int64_t rows = shape.directions * shape.B, c = lstm ? rows * shape.H : 0;
    return i == kX    ? shape.N * shape.I
           : i == kDy ? shape.N * shape.directions * shape.P
           : has_c(i) ? c
                      : rows * shape.P;
  }
  int64_t weight_size(int i) const {
    const int64_t rows = i == kWhr ? (shape.projected ? shape.P : 0) : G * shape.H;
    return i == kBih || i == kBhh ? rows : rows * width(i);
  }
  int64_t width(int i) const { return i == kWih ? shape.I : i == kWhr ? shape.H : shape.P; }
  bool given(int i) const { return i == kX || (i == kDy ? !only_final : states); }
  static bool has_c(int i) { return i == kC0 || i == kDcN; }
};

// The inputs of a layer, with zeros for those that are not given; or its results, each at the index of its counterpart:
// dx at kX, y at kDy.
template <class V>
struct Data {
  std::vector<V> of[kStates], w[2][kWeights];

  Data(const Layer& layer, V fill) {
    for (int i = 0; i < kStates; ++i) of[i].assign(layer.size(i), fill);
    for (int i = 0; i < 2 * kWeights; ++i) w[i / kWeights][i % kWeights].assign(layer.weight_size(i % kWeights), fill);
  }
  // Calls f(scale, vector) for each input that is given.
  template <class F>
  void each_given(const Layer& layer, const F& f) {
    for (int i = 0; i < kStates; ++i) {
      if (layer.given(i)) f(1, of[i]);
    }
    for (auto& direction : w) {
      for (int i = 0; i < kWeights; ++i) {
        if (layer.biases || (i != kBih && i != kBhh)) f(1.5 / std::sqrt(layer.width(i)), direction[i]);
      }
    }
  }
};

// The reference: one row of the batch at a time, forward and then back through its steps.

using Vector = std::vector<double>;

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// y += W x and x_grad += W^T y_grad, w_grad += y_grad x^T, for W [M, K].
inline void add_product(double* y, const Vector& W, const double* x, int64_t M, int64_t K) {
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t k = 0; k < K; ++k) y[m] += W[m * K + k] * x[k];
  }
}
inline void add_gradients(double* x_grad, Vector& w_grad, const Vector& W, const double* x, const double* y_grad,
                          int64_t M, int64_t K) {
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t k = 0; k < K; ++k) {
      x_grad[k] += W[m * K + k] * y_grad[m];
      w_grad[m * K + k] += y_grad[m] * x[k];
    }
  }
}

struct Step {
  int64_t row;
  Vector h, c;               // the states before the step
  Vector a, q;               // pre-activations from x and from h
  Vector v, c_next, hidden;  // gates after their activations; the new c; h before the projection, if any
};

inline void cell_forward(const Layer& layer, Step& s) {
  const int64_t H = layer.shape.H;
  for (int64_t j = 0; j < H; ++j) {
    const auto sum = [&](int g) { return s.a[g * H + j] + s.q[g * H + j]; };
    double* const v = &s.v[j];  // gate g at v[g * H]
    if (layer.lstm) {
      v[0] = sigmoid(sum(0)), v[H] = sigmoid(sum(1)), v[2 * H] = std::tanh(sum(2)), v[3 * H] = sigmoid(sum(3));
      s.c_next[j] = v[H] * s.c[j] + v[0] * v[2 * H];
      s.hidden[j] = v[3 * H] * std::tanh(s.c_next[j]);
    } else if (layer.shape.cell == CellKind::kGru) {
      v[0] = sigmoid(sum(0)), v[H] = sigmoid(sum(1));
      v[2 * H] = std::tanh(s.a[2 * H + j] + v[0] * s.q[2 * H + j]);
      s.hidden[j] = (1 - v[H]) * v[2 * H] + v[H] * s.h[j];
    } else {
      s.hidden[j] = v[0] = layer.shape.cell == CellKind::kRnnTanh ? std::tanh(sum(0)) : std::max(sum(0), 0.0);
    }
  }
}

// Computes da, dq, dc and the part of dh that does not pass through q, from dhidden and the gradient of the new c,
// which dc holds at first.
inline void cell_backward(const Layer& layer, const Step& s, const Vector& dhidden, Vector& dc, Vector& da, Vector& dq,
                          Vector& dh) {
  const int64_t H = layer.shape.H;
  for (int64_t j = 0; j < H; ++j) {
    const double d = dhidden[j];
    const double* const v = &s.v[j];
    const auto set = [&](int g, double dv, double slope) { da[g * H + j] = dq[g * H + j] = dv * slope; };
    if (layer.lstm) {
      const double i = v[0], f = v[H], g = v[2 * H], o = v[3 * H], tanh_c = std::tanh(s.c_next[j]);
      dc[j] += d * o * (1 - tanh_c * tanh_c);
      set(0, dc[j] * g, i * (1 - i)), set(1, dc[j] * s.c[j], f * (1 - f));
      set(2, dc[j] * i, 1 - g * g), set(3, d * tanh_c, o * (1 - o));
      dc[j] *= f;
    } else if (layer.shape.cell == CellKind::kGru) {
      const double r = v[0], z = v[H], n = v[2 * H], dn = d * (1 - z) * (1 - n * n);
      set(0, dn * s.q[2 * H + j], r * (1 - r)), set(1, d * (s.h[j] - n), z * (1 - z));
      da[2 * H + j] = dn, dq[2 * H + j] = dn * r;
      dh[j] = d * z;
    } else {
      set(0, d, layer.shape.cell == CellKind::kRnnTanh ? 1 - v[0] * v[0] : v[0] > 0);
    }
  }
}

inline Data<double> reference(const Layer& layer, const Data<double>& in) {
  const LayerShape& shape = layer.shape;
  const int64_t B = shape.B, I = shape.I, H = shape.H, P = shape.P, D = shape.directions, GH = layer.G * H;
  Data<double> out(layer, 0);
  for (int64_t d = 0; d < D; ++d) {
    const Vector* const w = in.w[d];
    Vector* const dw = out.w[d];
    for (int64_t b = 0; b < B; ++b) {
      const int64_t at_h = (d * B + b) * P, at_c = (d * B + b) * H;
      const auto part = [](const Vector& v, int64_t begin, int64_t n) {
        return v.empty() ? Vector(n) : Vector(v.begin() + begin, v.begin() + begin + n);
      };
      const auto put = [](Vector& to, int64_t begin, const Vector& v) {
        if (!to.empty()) std::copy(v.begin(), v.end(), to.begin() + begin);
      };
      std::vector<Step> steps;
      Vector h = part(in.of[kH0], at_h, P), c = part(in.of[kC0], at_c, H);
      for (int64_t t = 0; t < shape.T; ++t) {
        if (b < shape.rows(t)) steps.push_back({shape.row(t) + b});
      }
      if (d == 1) std::reverse(steps.begin(), steps.end());
      for (Step& s : steps) {
        s.h = h, s.c = c, s.a = w[kBih], s.q = w[kBhh], s.v = Vector(GH), s.c_next = s.hidden = Vector(H);
        add_product(s.a.data(), w[kWih], &in.of[kX].data()[s.row * I], GH, I);
        add_product(s.q.data(), w[kWhh], s.h.data(), GH, P);
        cell_forward(layer, s);
        h = shape.projected ? Vector(P) : s.hidden;
        if (shape.projected) add_product(h.data(), w[kWhr], s.hidden.data(), P, H);
        c = s.c_next;
        put(out.of[kDy], (s.row * D + d) * P, h);
      }
      put(out.of[kDhN], at_h, h), put(out.of[kDcN], at_c, c);

      Vector dh = part(in.of[kDhN], at_h, P), dc = part(in.of[kDcN], at_c, H), da(GH), dq(GH);
      for (auto s = steps.rbegin(); s != steps.rend(); ++s) {
        for (int64_t j = 0; j < P; ++j) dh[j] += in.of[kDy][(s->row * D + d) * P + j];
        Vector dhidden = shape.projected ? Vector(H) : dh, dh_prev(P);
        if (shape.projected) add_gradients(dhidden.data(), dw[kWhr], w[kWhr], s->hidden.data(), dh.data(), P, H);
        cell_backward(layer, *s, dhidden, dc, da, dq, dh_prev);
        const int64_t at_x = s->row * I;
        add_gradients(&out.of[kX].data()[at_x], dw[kWih], w[kWih], &in.of[kX].data()[at_x], da.data(), GH, I);
        add_gradients(dh_prev.data(), dw[kWhh], w[kWhh], s->h.data(), dq.data(), GH, P);
        for (int64_t j = 0; j < GH; ++j) dw[kBih][j] += da[j], dw[kBhh][j] += dq[j];
        dh = dh_prev;
      }
      put(out.of[kH0], at_h, dh), put(out.of[kC0], at_c, dc);
    }
  }
  return out;
}

}  // namespace check
}  // namespace fused_rnn
