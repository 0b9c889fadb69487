// All layers of a module forward, in one call: what a call costs counts more here than what it computes.
#include "cpu_layer.h"
#include "cpu_operators.h"
#include "scratch.h"

namespace fused_rnn {
namespace bindings {

StackResults stack(Tensor x, OptionalTensor h0, OptionalTensor c0, int64_t cell, int64_t layers, int64_t directions,
                   std::vector<Tensor> weights, bool has_biases, bool projected, bool deterministic, bool train) {
  const ScalarType type = x.scalar_type();
  FUSED_RNN_CHECK(type == ScalarType::Float || type == ScalarType::Double, "x must be float32 or float64");
  FUSED_RNN_CHECK(directions == 1 || directions == 2, "a layer has 1 or 2 directions, got ", directions);
  const int64_t D = directions, each = 2 + 2 * has_biases + projected, count = static_cast<int64_t>(weights.size());
  FUSED_RNN_CHECK(!train || x.dim() == 3, "training takes sequences, [T, B, I]");
  FUSED_RNN_CHECK(layers > 0 && layers <= count && layers * D * each == count, "expected ", each,
                  " weights for each of ", layers, " layers and ", D, " directions, got ", count);

  int64_t H = 0, P = 0;
  OptionalTensor h_n, c_n, between, reserve;
  for (int64_t index = 0; index < layers; ++index) {
    const Tensor* const given = &weights[index * D * each];
    CpuLayer layer(cell, x.sizes(), type, given[1].sizes(), projected, D == 2, std::nullopt);
    layer.shape.train = train;
    layer.shape.deterministic = deterministic;
    layer.choose_products(0, true);
    const LayerShape& s = layer.shape;
    if (index == 0) {
      H = s.H, P = s.P;
      const auto state = [&](int64_t width) { return layer.new_tensor({layers * D, s.B, width}); };
      h0 = layer.readable(h0, "h0", {layers * D, s.B, P});
      FUSED_RNN_CHECK(layer.cell.has_c || !c0, "only the LSTM has c0");
      h_n = state(P);
      if (layer.cell.has_c) c_n = layer.copy_or_zeros(layer.readable(c0, "c0", {layers * D, s.B, H}), state(H));
      if (train) {
        between = layer.new_tensor({(layers - 1) * layer.T, s.B, D * P});
        reserve = layer.new_reserve(layers * D);
      }
    }
    FUSED_RNN_CHECK(s.H == H && s.P == P, "all layers must be as wide as the first");
    x = layer.checked_sequence(x, "x", s.I);
    const bool is_last = index == layers - 1;
    const Tensor y =
        train && !is_last ? torch::stable::narrow(*between, 0, index * layer.T, layer.T) : layer.new_sequence(D * P);
    std::optional<Weights> checked[2];  // as long as the kernels read them
    for (int64_t d = 0; d < D; ++d) {
      const Tensor* const w = given + d * each;
      const auto maybe = [&](bool present, int64_t at) { return present ? OptionalTensor(w[at]) : std::nullopt; };
      checked[d] =
          layer.checked_weights(w[0], w[1], maybe(has_biases, 2), maybe(has_biases, 3), maybe(projected, each - 1));
    }
    const ForwardDirection first = inputs_of_forward(x, *checked[0]);
    cpu::reconsider_products(layer.shape, first.x, first.w_ih);
    const int64_t workspace = whole_lines(layer.kernels.forward_workspace(s));
    const Scratch scratch(D * workspace * layer.element());
    char* const of_layer =
        train ? layer.offset(*reserve, index * D * layer.reserve_rows() * layer.reserve_width()) : nullptr;
    ForwardParams params{s, {}};
    for (int64_t d = 0; d < D; ++d) {
      const int64_t row = (index * D + d) * s.B;
      ForwardDirection& p = params.direction[d] = inputs_of_forward(x, *checked[d]);
      p.h0 = h0 ? layer.offset(*h0, row * P) : nullptr;
      if (train) p.reserve = layer.reserve(of_layer, d);
      p.y = layer.offset(y, d * P);
      p.y_stride = D * P;
      p.h_n = layer.offset(*h_n, row * P);
      p.c = layer.cell.has_c ? layer.offset(*c_n, row * H) : nullptr;
      p.workspace = scratch.data() + d * workspace * layer.element();
    }
    if (s.N > 0 && P > 0) cpu::forward(layer.kernels, params, torch::stable::get_num_threads());
    x = y;
  }
  const auto out = [](const OptionalTensor& tensor) { return tensor ? *tensor : Tensor(); };
  return {x, *h_n, out(c_n), out(between), out(reserve)};
}

}  // namespace bindings
}  // namespace fused_rnn
