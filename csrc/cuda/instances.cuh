// The launchers of one cell, included by the cell's .cu file: they select the template instance for the run-time values
// and launch it.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "backward.cuh"
#include "forward.cuh"
#include "normalised.cuh"
#include "pointwise.cuh"
#include "recurrence.h"

namespace fused_rnn {
namespace cuda {

template <class F>
void with_element(Element element, const F& f) {
  switch (element) {
    case Element::kBf16:
      return f(Bf16{});
    case Element::kFp16:
      return f(Fp16{});
    case Element::kTf32:
      return f(Tf32{});
  }
}

template <class F>
void with_stored_type(StoredType type, const F& f) {
  switch (type) {
    case StoredType::kBf16:
      return f(Bf16{});
    case StoredType::kFp16:
      return f(Fp16{});
    case StoredType::kFloat32:
      return f(Float32{});
    case StoredType::kFloat64:
      return f(Float64{});
  }
}

template <class F>
void with_shape(const Instance& i, const F& f) {
#define FUSED_RNN_CASE(exchange_, unit, depth, row)                                                              \
  if (i.exchange == Exchange::exchange_ && i.unit_warps == unit && i.depth_warps == depth && i.row_tiles == row) \
    return f(Shape<Exchange::exchange_, unit, depth, row>{});
  FUSED_RNN_INSTANCES(FUSED_RNN_CASE)
#undef FUSED_RNN_CASE
  throw std::logic_error("fused_rnn: there is no such kernel instance");
}

// Launches the kernel once for every plan.rows rows of the batch.
template <class Params>
void launch_parts(void (*kernel)(Params), const Plan& plan, Params params, void* stream) {
  Sequence& q = params.sequence;
  q.division = plan.division;
  q.has_options = q.lengths || q.resets;
  for (int i = 0; i < q.directions; ++i) {
    const auto& d = params.direction[i];
    q.has_options = q.has_options || d.drop_h || d.zones.h.at || d.zones.c.at;
  }
  // Blocks of a team wait for each other, so they must run at the same time. The hardware guarantees that for the
  // blocks of a cluster; ThroughL2 needs a cooperative launch.
  const Grid grid{plan.blocks(q.directions), plan.instance.threads(), plan.shared_bytes,
                  through_l2(plan.instance.exchange), plan.instance.cluster(plan.division.parts)};
  for (int64_t row = 0; row < q.B; row += plan.rows) {
    q.first_row = row;
    q.last_row = std::min(q.B, row + plan.rows);
    launch(kernel, grid, stream, params);
  }
}

inline Grid pointwise_grid(int64_t values) {
  const int64_t blocks = (values + kPointwiseThreads - 1) / kPointwiseThreads;
  return {static_cast<int>(std::min<int64_t>(blocks, 4 * current_device().sms)), kPointwiseThreads, 0, false};
}

// One block for each row, up to four blocks per multiprocessor; each block loops over rows.
template <class E>
Grid normalised_grid(int64_t rows) {
  return {static_cast<int>(std::min<int64_t>(rows, 4 * current_device().sms)), kPointwiseThreads,
          kNormalisedBytes<typename E::Arithmetic>, false};
}

template <class Cell>
struct Instances {
  static void run_forward(Element element, const Plan& plan, ForwardParams params, void* stream) {
    with_element(element, [&](auto e) {
      using E = decltype(e);  // named here because g++ takes the captured e for a reference below
      with_shape(plan.instance, [&](auto shape) {
        if constexpr (has_forward(decltype(shape)::kExchange)) {
          launch_parts(&forward<Cell, E, decltype(shape)>, plan, params, stream);
        } else {
          throw std::logic_error("fused_rnn: this kernel instance has no forward");
        }
      });
    });
  }
  static void run_backward(Element element, const Plan& plan, BackwardParams params, void* stream) {
    with_element(element, [&](auto e) {
      with_shape(plan.instance, [&](auto shape) {
        launch_parts(&backward<Cell, decltype(e), decltype(shape)>, plan, params, stream);
      });
    });
  }
  static void run_step_forward(StoredType type, const StepForwardParams& params, void* stream) {
    with_stored_type(type, [&](auto e) {
      launch(&step_forward<Cell, decltype(e)>, pointwise_grid(params.B * params.H), stream, params);
    });
  }
  static void run_step_backward(StoredType type, const StepBackwardParams& params, void* stream) {
    with_stored_type(type, [&](auto e) {
      launch(&step_backward<Cell, decltype(e)>, pointwise_grid(params.B * params.H), stream, params);
    });
  }
  static void run_normalised_forward(StoredType type, const NormalisedForwardParams& params, void* stream) {
    with_stored_type(type, [&](auto e) {
      launch(&normalised_forward<Cell, decltype(e)>, normalised_grid<decltype(e)>(params.step.B), stream, params);
    });
  }
  static void run_normalised_backward(StoredType type, const NormalisedBackwardParams& params, void* stream) {
    with_stored_type(type, [&](auto e) {
      launch(&normalised_backward<Cell, decltype(e)>, normalised_grid<decltype(e)>(params.step.B), stream, params);
    });
  }
  static constexpr Recurrence table() {
    return {run_forward,       run_backward,           run_step_forward,
            run_step_backward, run_normalised_forward, run_normalised_backward};
  }
};

}  // namespace cuda
}  // namespace fused_rnn
