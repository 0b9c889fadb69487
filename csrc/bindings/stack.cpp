// All layers of a module in one call, forward and backward: what a call costs counts more here than what it computes.
#include <algorithm>
#include <array>
#include <cstring>

#include "cpu_layer.h"
#include "cpu_operators.h"
#include "module_call.h"
#include "scratch.h"

namespace fused_rnn {
namespace bindings {

namespace {

// How many weights each layer and direction has.
int64_t weights_of_each(int64_t layers, int64_t directions, size_t given, bool has_biases, bool projected) {
  const int64_t each = 2 + 2 * has_biases + projected, count = static_cast<int64_t>(given);
  FUSED_RNN_CHECK(directions == 1 || directions == 2, "a layer has 1 or 2 directions, got ", directions);
  FUSED_RNN_CHECK(layers > 0 && layers <= count && layers * directions * each == count, "expected ", each,
                  " weights for each of ", layers, " layers and ", directions, " directions, got ", count);
  return each;
}

// The steps of all layers below the last.
int64_t steps_between(int64_t layers, int64_t T) {
  int64_t steps = 0;
  FUSED_RNN_CHECK(!__builtin_mul_overflow(layers - 1, T, &steps), "x has too many steps: ", T);
  return steps;
}

// Of [all, ...] the `count` entries from `first` on.
Tensor part(const Tensor& tensor, const char* name, int64_t all, int64_t first, int64_t count) {
  FUSED_RNN_CHECK(tensor.dim() == 3 && tensor.size(0) == all, name, " must have ", all, " entries, got ",
                  shape_text(tensor.sizes()));
  return viewed(tensor, {count, tensor.size(1), tensor.size(2)}, {tensor.stride(0), tensor.stride(1), tensor.stride(2)},
                tensor.numel() == 0 ? 0 : first * tensor.stride(0));
}
OptionalTensor part(const OptionalTensor& tensor, const char* name, int64_t all, int64_t first, int64_t count) {
  if (!tensor) return std::nullopt;
  return part(*tensor, name, all, first, count);
}

// [L*D, B, width] from [D, B, width] of every layer.
Tensor one_after_the_other(const std::vector<Tensor>& of_layers) {
  const Tensor& first = of_layers[0];
  const int64_t L = static_cast<int64_t>(of_layers.size()), bytes = first.numel() * first.element_size();
  if (L == 1) return first;
  const Tensor all = empty({L * first.size(0), first.size(1), first.size(2)}, first.scalar_type());
  for (int64_t index = 0; index < L && bytes > 0; ++index) {
    std::memcpy(static_cast<char*>(all.data_ptr()) + index * bytes, of_layers[index].data_ptr(), bytes);
  }
  return all;
}

}  // namespace

StackResults stack(Tensor x, OptionalTensor h0, OptionalTensor c0, std::vector<Tensor> weights, int64_t cell,
                   int64_t layers, int64_t directions, bool has_biases, bool projected, int64_t layout_number,
                   OptionalTensor resets, OptionalTensor lengths, bool deterministic, bool train) {
  const ScalarType type = x.scalar_type();  // of what comes in and goes out, also between layers
  const Layout layout = layout_by_number(layout_number);
  const bool is_cell = layers == 0, is_unbatched = layout == Layout::kUnbatched;
  FUSED_RNN_CHECK(!is_cell || layout == Layout::kStep, "a cell takes a single step");
  FUSED_RNN_CHECK(!is_cell || !(resets || lengths), "a cell has no resets and no lengths");
  if (is_cell) layers = 1;
  const bool keeps_layout = layout == Layout::kStep && !resets;  // which has no need of a dimension of time
  FUSED_RNN_CHECK(!keeps_layout || x.dim() == 2, "x of a single step must have 2 dimensions, got ", x.dim());
  if (!keeps_layout) x = time_first(x, "x", layout, 3);
  resets = time_first(resets, "resets", layout, 2);
  if (is_unbatched) h0 = time_first(h0, "h0", layout, 3), c0 = time_first(c0, "c0", layout, 3);
  const int64_t D = directions, each = weights_of_each(layers, D, weights.size(), has_biases, projected);

  int64_t H = 0, P = 0;
  OptionalTensor h_n, c_n, between, reserve;
  RaggedRows rows;  // of all layers: another thread may write to the caller's lengths meanwhile
  if (lengths) {
    FUSED_RNN_CHECK(layout != Layout::kStep, "a single step has no lengths");
    rows.of_lengths(*lengths, x.size(0), x.size(1));
  }
  for (int64_t index = 0; index < layers; ++index) {
    const Tensor* const given = &weights[index * D * each];
    CpuLayer layer(cell, x.sizes(), type, given[1].sizes(), projected, D == 2, std::nullopt);
    layer.end_at(rows);
    layer.shape.train = train;
    layer.shape.deterministic = deterministic;
    layer.replace_at(resets);
    layer.choose_products(0, true);
    const LayerShape& s = layer.shape;
    if (index == 0) {
      H = s.H, P = s.P;
      FUSED_RNN_CHECK(layer.cell.has_c || !c0, "only the LSTM has c0");
      const auto state = [&](const OptionalTensor& given, const char* name, int64_t width) {
        return is_cell ? layer.checked_state(given, name, width)
                       : layer.readable(given, name, {layers * D, layer.B, width});
      };
      const auto new_state = [&](int64_t width) {
        return is_cell ? layer.new_state(width) : layer.new_tensor({layers * D, layer.B, width});
      };
      h0 = state(h0, "h0", P);
      if (!is_cell) layer.pass_on(h0, *(h_n = new_state(P)));
      if (layer.cell.has_c) c_n = layer.copy_or_zeros(state(c0, "c0", H), new_state(H));
      if (train) {
        if (layers > 1) between = empty({steps_between(layers, layer.T), layer.B, D * P}, type);
        reserve = layer.new_reserve(layers * D);
      }
    }
    FUSED_RNN_CHECK(s.H == H && s.P == P, "all layers must be as wide as the first");
    x = layer.checked_sequence(x, "x", s.I);
    const bool is_last = index == layers - 1;
    OptionalTensor kept;  // y, for backward
    if (train && !is_last) {
      kept = part(*between, "between", steps_between(layers, layer.T), index * layer.T, layer.T);
      if (layer.step) kept = laid_out(*kept, Layout::kStep);
    }
    const Tensor y = kept && type == layer.dtype ? *kept : layer.new_sequence(D * P);
    layer.clear_absent(y, D * P);
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
      const int64_t row = (index * D + d) * layer.B;
      ForwardDirection& p = params.direction[d] = inputs_of_forward(x, *checked[d]);
      p.h0 = h0 ? layer.offset(*h0, row * P) : nullptr;
      if (train) p.reserve = layer.reserve(of_layer, d);
      p.y = layer.offset(y, d * P);
      p.y_stride = D * P;
      p.h_n = h_n ? layer.offset(*h_n, row * P) : nullptr;
      p.c = layer.cell.has_c ? layer.offset(*c_n, row * H) : nullptr;
      p.workspace = scratch.data() + d * workspace * layer.element();
    }
    if (s.N > 0 && P > 0) cpu::forward(layer.kernels, params, torch::stable::get_num_threads());
    if (kept && type != layer.dtype) convert(*kept, y);
    x = kept ? *kept : converted(y, type);
  }
  const auto out = [](const OptionalTensor& tensor) { return tensor ? *tensor : Tensor(); };
  if (h_n) h_n = converted(*h_n, type);
  if (c_n) c_n = converted(*c_n, type);
  const auto state = [&](const OptionalTensor& all) { return is_unbatched && all ? laid_out(*all, layout) : out(all); };
  return {keeps_layout ? x : laid_out(x, layout), state(h_n), state(c_n), out(between), out(reserve)};
}

std::vector<Tensor> stack_backward(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n, Tensor x,
                                   OptionalTensor between, Tensor reserve, std::vector<OptionalTensor> weights,
                                   int64_t cell, int64_t layers, int64_t directions, bool has_biases, bool projected,
                                   int64_t layout_number, OptionalTensor resets, OptionalTensor lengths,
                                   std::vector<bool> needs) {
  const Layout layout = layout_by_number(layout_number);
  const bool is_cell = layers == 0;
  if (is_cell) layers = 1;
  const int64_t D = directions, each = weights_of_each(layers, D, weights.size(), has_biases, projected);
  FUSED_RNN_CHECK(needs.size() == 3 + weights.size(), "needs must have ", 3 + weights.size(), " entries, got ",
                  needs.size());
  const bool need_dstate = needs[1] || needs[2], are_states_laid_out = is_cell || layout == Layout::kUnbatched;
  FUSED_RNN_CHECK(!is_cell || (layout == Layout::kStep && !dh_n), "a cell takes a single step and has no dh_n");
  x = time_first(x, "x", layout, 3), dy = time_first(dy, "dy", layout, 3);
  resets = time_first(resets, "resets", layout, 2);
  if (are_states_laid_out) dh_n = time_first(dh_n, "dh_n", layout, 3), dc_n = time_first(dc_n, "dc_n", layout, 3);
  Options options;
  options.resets = resets, options.lengths = lengths;
  const GivenOptions given_options = resets || lengths ? options.as_list() : std::nullopt;
  FUSED_RNN_CHECK(between || layers == 1, "between is missing");
  const int64_t T = x.size(0), all_between = steps_between(layers, T);

  std::vector<Tensor> found(needs.size()), dh0(need_dstate ? layers : 0), dc0(need_dstate ? layers : 0);
  for (int64_t index = layers - 1; index >= 0; --index) {
    const int64_t first = index * D * each, rows = index * D;  // of the weights, of the states
    const auto below = needs.begin() + (index == 0 ? 1 : 3 + first);
    const bool need_dx = std::find(needs.begin(), below, true) != below;
    const auto need = [&](int64_t weight) {
      return needs[3 + first + weight] || (D == 2 && needs[3 + first + each + weight]);
    };
    const auto given = [&](int64_t direction, int64_t weight) -> OptionalTensor {
      return direction < D ? weights[first + direction * each + weight] : std::nullopt;
    };
    const auto projection = [&](int64_t direction) { return projected ? given(direction, each - 1) : std::nullopt; };
    FUSED_RNN_CHECK(given(0, 0) && given(0, 1) && weights[1], "w_ih and w_hh must be given");
    const auto wide = given(0, 1)->sizes(), first_wide = weights[1]->sizes();
    FUSED_RNN_CHECK(std::equal(wide.begin(), wide.end(), first_wide.begin(), first_wide.end()),
                    "all layers must be as wide as the first");
    const auto all =
        std::apply([](auto&&... gradient) { return std::array<Tensor, sizeof...(gradient)>{std::move(gradient)...}; },
                   backward(dy, part(dh_n, "dh_n", layers * D, rows, D), part(dc_n, "dc_n", layers * D, rows, D),
                            index == 0 ? x : part(*between, "between", all_between, (index - 1) * T, T),
                            part(reserve, "reserve", layers * D, rows, D), cell, need_dx, need_dstate, need(0), need(1),
                            has_biases && (need(2) || need(3)), projected && need(each - 1), given(0, 0), *given(0, 1),
                            projection(0), given(1, 0), given(1, 1), projection(1), given_options, 0, std::nullopt,
                            false, false, 0, kPlanned));
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t weight = 0; weight < each; ++weight) {
        const int64_t at = projected && weight == each - 1 ? 4 : weight;  // of five
        const int64_t to = 3 + first + d * each + weight;
        if (needs[to]) found[to] = all[3 + 5 * d + at];
      }
    }
    if (need_dstate) dh0[index] = all[1], dc0[index] = all[2];
    if (!need_dx) break;  // nor what is below
    dy = all[0];
  }
  if (needs[0]) found[0] = laid_out(*dy, layout);
  const auto joined = [&](const std::vector<Tensor>& states) {
    const Tensor all = one_after_the_other(states);
    return are_states_laid_out ? laid_out(all, layout) : all;
  };
  if (needs[1]) found[1] = joined(dh0);
  if (needs[2] && dc0[0].defined()) found[2] = joined(dc0);
  return found;
}

}  // namespace bindings
}  // namespace fused_rnn
