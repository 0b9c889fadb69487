// Checks the CPU kernel tables against a plain reference in double precision. It needs neither torch nor Python, and
// runs the workers on std::thread, so that the kernels can be checked under the thread sanitizer (which does not
// understand libgomp's synchronisation) and in an emulator of another processor.
//
//   kernel_check [--quick] [--without-barrier] [table...]
//
// Every case runs on one thread and on teams of two and three threads that split rows or units. --quick skips the large
// cases and uses two threads only. --without-barrier removes the teams' barrier, which the check must notice. Buffers
// have their exact size (workspaces: whole cache lines) and are filled with NaN where the kernels must write before
// they read. Prints the largest error of each table. If an error is above the tolerance, names the case and exits
// with 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/cpu/dispatch.h"

namespace {

using namespace fused_rnn;

enum : int { kX, kH0, kC0, kDy, kDhN, kDcN, kStates };
enum : int { kWih, kWhh, kBih, kBhh, kWhr, kWeights };
const char* const kResultNames[] = {"dx", "dh0", "dc0", "y", "h_n", "c_n"};
const char* const kGradientNames[] = {"dw_ih", "dw_hh", "db_ih", "db_hh", "dw_hr"};

// flags: '2': two directions; 'b': biases; 's': initial states, and their gradients; 'p': packed rows; 'f': gradients
// of the final states only, no dy; 'q': included in --quick.
struct Case {
  const char* cells;  // 't': tanh, 'r': ReLU, 'l': LSTM, 'g': GRU
  int64_t T, B, I, H, projection;
  const char* flags;
  bool has(char flag) const { return std::strchr(flags, flag) != nullptr; }
};

const Case kCases[] = {
    // Fewer than 8 rows over all steps: unpacked weights.
    {"trlg", 1, 1, 1, 1, 0, "bsq"},
    {"trlg", 1, 7, 33, 20, 0, "bq"},
    {"trlg", 2, 3, 5, 7, 0, "2bsq"},
    {"trlg", 3, 2, 40, 65, 0, "2bspq"},
    {"trlg", 7, 1, 20, 33, 0, "2bfsq"},
    {"l", 2, 2, 3, 8, 7, "2bsq"},
    {"l", 1, 1, 5, 70, 33, "bs"},
    // One row per step: unpacked W_hh, several blocks together.
    {"trlg", 20, 1, 17, 70, 0, "2bsq"},
    {"trlg", 9, 1, 30, 130, 0, "s"},
    {"trlg", 8, 1, 5, 400, 0, "bs"},
    {"tr", 8, 1, 5, 790, 0, "2b"},
    {"l", 9, 1, 7, 70, 33, "2bsq"},
    // A few rows per step: W_ih x is computed before the first step.
    {"trlg", 4, 2, 10, 65, 0, "2bsp"},
    {"trlg", 5, 5, 18, 77, 0, "2bspq"},
    {"trlg", 6, 7, 64, 64, 0, ""},
    {"trlg", 3, 3, 0, 5, 0, "2bs"},
    {"l", 5, 3, 7, 20, 9, "2bspq"},
    // More rows, up to several chunks of 24 (kChunk).
    {"trlg", 6, 8, 12, 96, 0, "bfsq"},
    {"trlg", 3, 13, 9, 50, 0, "2bspq"},
    {"trlg", 1, 16, 16, 32, 0, "2bs"},
    {"trlg", 5, 25, 34, 40, 0, "2bs"},
    {"trlg", 4, 60, 20, 30, 0, "2bspq"},
    {"l", 4, 26, 8, 66, 40, "2bsp"},
    // Long sums: more than 128 (kRun) and more than 1024 (kDepth) products or rows.
    {"trlg", 2, 9, 10, 300, 0, "2bs"},
    {"lg", 2, 2, 3, 400, 0, "bs"},
    {"trlg", 1, 9, 1100, 24, 0, "bs"},
    {"trlg", 2, 9, 1100, 24, 0, "2bsp"},
    {"trlg", 40, 30, 6, 10, 0, "2bs"},
    {"lg", 40, 15, 530, 9, 0, "b"},
    {"l", 3, 9, 5, 300, 140, "2bs"},
    {"l", 2, 8, 3, 1030, 5, "bs"},
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

// The inputs of a layer, zeros where none are given; or its results, each at the index of the input that it corresponds
// to: dx at kX, y at kDy, h_n at kDhN, dh0 at kH0.
template <class V>
struct Data {
  std::vector<V> tensors[kStates], w[2][kWeights];

  Data(const Layer& layer, V fill) {
    for (int i = 0; i < kStates; ++i) tensors[i].assign(layer.size(i), fill);
    for (int i = 0; i < 2 * kWeights; ++i) w[i / kWeights][i % kWeights].assign(layer.weight_size(i % kWeights), fill);
  }
  // Calls f(scale, vector) for each input that is given; values are drawn from [-scale, scale].
  template <class F>
  void each_given(const Layer& layer, const F& f) {
    for (int i = 0; i < kStates; ++i) {
      if (layer.given(i)) f(1, tensors[i]);
    }
    for (auto& direction : w) {
      for (int i = 0; i < kWeights; ++i) {
        if (layer.biases || (i != kBih && i != kBhh)) f(1.5 / std::sqrt(layer.width(i)), direction[i]);
      }
    }
  }
};

// ---- The reference: for each row of the batch, forward over its steps and then backward
// ----------------------------------

using Vector = std::vector<double>;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// y += W x and x_grad += W^T y_grad, w_grad += y_grad x^T, for W [M, K].
void add_product(double* y, const Vector& W, const double* x, int64_t M, int64_t K) {
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t k = 0; k < K; ++k) y[m] += W[m * K + k] * x[k];
  }
}
void add_gradients(double* x_grad, Vector& w_grad, const Vector& W, const double* x, const double* y_grad, int64_t M,
                   int64_t K) {
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
  Vector a, q;               // W_ih x + b_ih and W_hh h + b_hh
  Vector v, c_next, hidden;  // the gates after their activations; the new c; the new h before the projection
};

void cell_forward(const Layer& layer, Step& s) {
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

// From the gradients of hidden and, in dc, of the new c: those of a, of q, of c (in dc), and of h outside q.
void cell_backward(const Layer& layer, const Step& s, const Vector& dhidden, Vector& dc, Vector& da, Vector& dq,
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

Data<double> reference(const Layer& layer, const Data<double>& in) {
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
      Vector h = part(in.tensors[kH0], at_h, P), c = part(in.tensors[kC0], at_c, H);
      for (int64_t t = 0; t < shape.T; ++t) {
        if (b < shape.rows(t)) steps.push_back({shape.row(t) + b});
      }
      if (d == 1) std::reverse(steps.begin(), steps.end());
      for (Step& s : steps) {
        s.h = h, s.c = c, s.a = w[kBih], s.q = w[kBhh], s.v = Vector(GH), s.c_next = s.hidden = Vector(H);
        add_product(s.a.data(), w[kWih], &in.tensors[kX].data()[s.row * I], GH, I);
        add_product(s.q.data(), w[kWhh], s.h.data(), GH, P);
        cell_forward(layer, s);
        h = shape.projected ? Vector(P) : s.hidden;
        if (shape.projected) add_product(h.data(), w[kWhr], s.hidden.data(), P, H);
        c = s.c_next;
        put(out.tensors[kDy], (s.row * D + d) * P, h);
      }
      put(out.tensors[kDhN], at_h, h), put(out.tensors[kDcN], at_c, c);

      Vector dh = part(in.tensors[kDhN], at_h, P), dc = part(in.tensors[kDcN], at_c, H), da(GH), dq(GH);
      for (auto s = steps.rbegin(); s != steps.rend(); ++s) {
        for (int64_t j = 0; j < P; ++j) dh[j] += in.tensors[kDy][(s->row * D + d) * P + j];
        Vector dhidden = shape.projected ? Vector(H) : dh, dh_prev(P);
        if (shape.projected) add_gradients(dhidden.data(), dw[kWhr], w[kWhr], s->hidden.data(), dh.data(), P, H);
        cell_backward(layer, *s, dhidden, dc, da, dq, dh_prev);
        const int64_t at_x = s->row * I;
        add_gradients(&out.tensors[kX].data()[at_x], dw[kWih], w[kWih], &in.tensors[kX].data()[at_x], da.data(), GH, I);
        add_gradients(dh_prev.data(), dw[kWhh], w[kWhh], s->h.data(), dq.data(), GH, P);
        for (int64_t j = 0; j < GH; ++j) dw[kBih][j] += da[j], dw[kBhh][j] += dq[j];
        dh = dh_prev;
      }
      put(out.tensors[kH0], at_h, dh), put(out.tensors[kC0], at_c, dc);
    }
  }
  return out;
}

// ---- The kernels, called as csrc/bindings/ops.cpp and csrc/cpu/dispatch.cpp call them
// --------------------------------------

struct Team {
  int64_t workers;
  bool splits_units, both_directions;  // both_directions: two teams run at the same time, one for each direction
};

// Calls work(direction, worker) for all directions and workers.
template <class Work>
void run(int64_t directions, const Team& team, bool with_barrier, const Work& work) {
  const int64_t W = team.workers, teams = team.both_directions ? 2 : 1;
  cpu::Barrier barriers[] = {cpu::Barrier(W), cpu::Barrier(W)};
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < teams * W; ++i) {
    threads.emplace_back([&, i] {
      cpu::Barrier* const barrier = W == 1 || !with_barrier ? nullptr : &barriers[i / W];
      const cpu::Worker worker{i % W, W, team.splits_units, barrier};
      for (int64_t d = i / W; d < directions; d += teams) work(d, worker);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

struct alignas(64) Line {
  char bytes[64];
};

template <class T>
Data<T> kernel_results(const cpu::Kernels& k, const Layer& layer, const Data<T>& in, const Team& team, bool train,
                       bool with_barrier) {
  LayerShape shape = layer.shape;
  shape.dtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;
  shape.train = train;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const int64_t N = shape.N, B = shape.B, H = shape.H, P = shape.P, D = shape.directions;
  const bool chains = shape.chains_h(layer.G == 1), projected = shape.projected, states = layer.states;
  Data<T> out(layer, nan);
  out.tensors[kDcN] = in.tensors[kC0], out.tensors[kC0] = in.tensors[kDcN];

  std::vector<std::vector<Line>> workspaces;
  const auto workspace = [&](int64_t elements) {  // filled with NaN
    workspaces.emplace_back((elements * sizeof(T) + sizeof(Line) - 1) / sizeof(Line));
    std::memset(workspaces.back().data(), 0xff, workspaces.back().size() * sizeof(Line));
    return workspaces.back().data();
  };
  const int64_t after_h = layer.saved * H + P, whole = after_h + (layer.lstm ? H : 0) + (projected ? H : 0);
  std::vector<T> reserves[2], dgates[2], dh_totals[2];
  ForwardParams f{shape, {}};
  BackwardParams b{shape, {}, false, out.tensors[kX].data(), workspace(k.gradients_workspace(shape) * team.workers)};
  for (int64_t d = 0; d < D; ++d) {
    const std::vector<T>* const w = in.w[d];
    std::vector<T>* const dw = out.w[d];
    Reserve reserve{};
    if (train && chains) {
      reserves[d].assign((N + B) * H, nan);
      T *const first = reserves[d].data(), *const second = first + B * H;
      reserve.gates = d ? first : second, reserve.h_prev = d ? second : first, reserve.stride = H;
    } else if (train) {
      reserves[d].assign(N * whole, nan);
      T* const at = reserves[d].data();
      reserve.gates = at, reserve.h_prev = at + layer.saved * H, reserve.stride = whole;
      if (layer.lstm) reserve.c_prev = at + after_h;
      if (projected) reserve.hidden = at + after_h + H;
    }
    dgates[d].assign(N * layer.grads * H, nan);
    dh_totals[d].assign(projected ? N * P : 0, nan);

    ForwardDirection& p = f.direction[d];
    BackwardDirection& q = b.direction[d];
    p.x = q.x = in.tensors[kX].data();
    p.w_ih = q.w_ih = w[kWih].data();
    p.w_hh = q.w_hh = w[kWhh].data();
    p.w_hr = q.w_hr = projected ? w[kWhr].data() : nullptr;
    p.b_ih = layer.biases ? w[kBih].data() : nullptr;
    p.b_hh = layer.biases ? w[kBhh].data() : nullptr;
    p.reserve = q.reserve = reserve;
    p.y_stride = q.dy_stride = D * P;
    p.h0 = states ? &in.tensors[kH0][d * B * P] : nullptr;
    p.y = &out.tensors[kDy][d * P];
    p.h_n = states ? &out.tensors[kDhN][d * B * P] : nullptr;
    p.c = layer.lstm ? &out.tensors[kDcN][d * B * H] : nullptr;
    p.workspace = workspace(k.forward_workspace(shape));
    q.dy = layer.only_final ? nullptr : &in.tensors[kDy][d * P];
    q.dh_n = states ? &in.tensors[kDhN][d * B * P] : nullptr;
    q.dgates = dgates[d].data();
    q.dh_total = projected ? dh_totals[d].data() : nullptr;
    q.dh0 = states ? &out.tensors[kH0][d * B * P] : nullptr;
    q.dc = layer.lstm ? &out.tensors[kC0][d * B * H] : nullptr;
    q.dw_ih = dw[kWih].data(), q.dw_hh = dw[kWhh].data(), q.db_ih = dw[kBih].data(), q.db_hh = dw[kBhh].data();
    q.dw_hr = projected ? dw[kWhr].data() : nullptr;
    q.workspace = workspace(k.backward_workspace(shape));
  }
  run(D, team, with_barrier, [&](int64_t d, const cpu::Worker& worker) { k.forward(f, d, worker); });
  if (!train) return out;
  run(D, team, with_barrier, [&](int64_t d, const cpu::Worker& worker) { k.backward(b, d, worker); });
  run(1, {team.workers}, false, [&](int64_t, const cpu::Worker& worker) { k.gradients(b, worker); });
  return out;
}

// ---- Comparison -----------------------------------------------------------------------------------------------------

struct Largest {
  double error = 0, limit = 1;
  std::string where = "nowhere";
};

// The largest difference, relative to the largest magnitude of the result; NaN counts as infinite.
template <class T>
double relative_error(const std::vector<T>& actual, const Vector& expected) {
  double difference = 0, magnitude = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double d = std::abs(actual[i] - expected[i]);
    difference = std::isnan(d) ? std::numeric_limits<double>::infinity() : std::max(difference, d);
    magnitude = std::max(magnitude, std::abs(expected[i]));
  }
  return difference == 0 ? 0 : difference / magnitude;
}

// The rounding errors of a sum of n terms grow like a random walk, to about sqrt(n) eps. The factor 8 allows for the
// cells and for errors that are carried from step to step.
template <class T>
double tolerance(const LayerShape& s, int64_t G) {
  const int64_t terms = std::max({s.I + s.P, G * s.H, s.N});
  return 8 * std::sqrt(double(terms)) * std::numeric_limits<T>::epsilon();
}

struct Options {
  bool quick = false, barrier = true;
};

// Checks one case with all teams; returns the number of failures.
template <class T>
int check(const cpu::Kernels& k, const Layer& layer, const Options& options, Largest& largest) {
  std::mt19937_64 random(1);
  Data<T> in(layer, 0);
  in.each_given(layer, [&](double scale, std::vector<T>& v) {
    for (T& value : v) value = T((double(random() >> 11) / double(1ull << 52) - 1) * scale);
  });
  Data<double> exact(layer, 0);
  for (int i = 0; i < kStates; ++i) exact.tensors[i].assign(in.tensors[i].begin(), in.tensors[i].end());
  for (int i = 0; i < 2 * kWeights; ++i) {
    const std::vector<T>& w = in.w[i / kWeights][i % kWeights];
    exact.w[i / kWeights][i % kWeights].assign(w.begin(), w.end());
  }
  const Data<double> expected = reference(layer, exact);
  const double limit = tolerance<T>(layer.shape, layer.G);
  int failures = 0;
  const auto compare = [&](const std::string& what, const std::vector<T>& a, const Vector& b) {
    const double error = relative_error(a, b);
    if (error > limit && ++failures <= 20) {
      std::printf("FAILED: %s %s, error %.2g, tolerance %.2g\n", k.name, what.c_str(), error, limit);
    }
    if (error / limit > largest.error / largest.limit) largest = {error, limit, what};
  };
  for (const Team& team : {Team{1}, Team{2}, Team{2, true}, Team{3}, Team{3, true}, Team{1, false, true},
                           Team{2, false, true}, Team{2, true, true}}) {
    if (team.both_directions && layer.shape.directions == 1) continue;
    if (options.quick && team.workers * (team.both_directions ? 2 : 1) != 2) continue;
    const std::string how = std::to_string(team.workers) + (team.splits_units ? " on units" : " on rows") +
                            (team.both_directions ? " per direction" : "");
    for (const bool train : {true, false}) {
      const Data<T> results = kernel_results<T>(k, layer, in, team, train, options.barrier);
      const std::string where = std::string(sizeof(T) == 4 ? "float32 " : "float64 ") + layer.name +
                                ", workers: " + how + (train ? "" : ", inference") + ": ";
      for (int i = train ? kX : kDy; i < kStates; ++i) {
        if (layer.states || (i != kH0 && i != kDhN))
          compare(where + kResultNames[i], results.tensors[i], expected.tensors[i]);
      }
      for (int i = 0; train && i < layer.shape.directions * kWeights; ++i) {
        const int d = i / kWeights, j = i % kWeights;
        compare(where + kGradientNames[j] + (d ? " reverse" : ""), results.w[d][j], expected.w[d][j]);
      }
    }
  }
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--quick") {
      options.quick = true;
    } else if (argument == "--without-barrier") {
      options.barrier = false;
    } else {
      names.push_back(argument);
    }
  }
  int failures = 0, tables = 0;
  for (const cpu::Kernels* k : cpu::supported()) {
    if (!names.empty() && std::find(names.begin(), names.end(), k->name) == names.end()) continue;
    int cases = 0;
    Largest largest[2];  // float32, float64
    for (const Case& c : kCases) {
      if (options.quick && !c.has('q')) continue;
      for (const char* cell = c.cells; *cell; ++cell, ++cases) {
        const Layer layer(c, *cell);
        failures += check<float>(*k, layer, options, largest[0]) + check<double>(*k, layer, options, largest[1]);
      }
    }
    for (const Largest& l : largest) {
      std::printf("%s: %d cases, largest error %.2g of %.2g in %s\n", k->name, cases, l.error, l.limit,
                  l.where.c_str());
    }
    ++tables;
  }
  std::printf("%d tables, %d failures\n", tables, failures);
  return failures > 0 || tables == 0;
}
