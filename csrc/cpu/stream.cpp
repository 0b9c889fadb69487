#include "stream.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "memory.h"

namespace fused_rnn {
namespace cpu {

namespace {

void require(const char* name, int64_t number, int64_t most) {
  if (number >= 1 && number <= most) return;
  throw std::runtime_error("fused_rnn: expected " + std::string(name) + " to be between 1 and " + std::to_string(most) +
                           ", got " + std::to_string(number));
}

}  // namespace

Stream::Stream(std::shared_ptr<const FrozenModel> model, int64_t batch, int64_t threads)
    : model_(std::move(model)), batch_(batch), threads_(threads), memory_(nullptr, std::free) {
  const FrozenModel& m = *model_;
  if (m.directions != 1) throw std::runtime_error("fused_rnn: a bidirectional model has no streams");
  require("batch", batch, INT32_MAX);
  require("threads", threads, 1024);
  int64_t workspace = 0;
  for (int64_t l = 0; l < m.layers; ++l) {
    LayerShape& s = layers_.emplace_back(ForwardParams{m.shape(l), {m.direction(l, 0), {}}}).shape;
    s.B = batch;
    for (const int64_t steps : {int64_t(1), kSteps}) {
      s.T = steps, s.N = steps * batch;
      workspace = std::max(workspace, kernels().forward_workspace(s));
    }
  }
  const int64_t row = batch * m.state_size, between = m.layers > 1 ? kSteps * row : 0;
  const int64_t parts[] = {h_size(), c_size(), between, between, workspace};
  constexpr int64_t kLine = 64;  // bytes: threads that share a step share no cache line of two parts
  const auto bytes = [](int64_t floats) { return (floats * 4 + kLine - 1) / kLine * kLine; };
  int64_t size = kLine;
  for (const int64_t part : parts) size += bytes(part);
  memory_.reset(allocate(size));
  if (!memory_) throw std::runtime_error("fused_rnn: no memory for a stream");
  std::memset(memory_.get(), 0, size);
  float* at[5];  // parts
  char* next = memory_.get();
  for (int i = 0; i < 5; ++i) at[i] = reinterpret_cast<float*>(next), next += bytes(parts[i]);
  h_ = at[0], c_ = at[1];
  for (int64_t l = 0; l < m.layers; ++l) {
    ForwardDirection& d = layers_[l].direction[0];
    d.h0 = d.h_n = h_ + l * row;
    d.c = m.has_c ? c_ + l * batch * m.hidden_size : nullptr;
    d.x = l ? at[2 + (l - 1) % 2] : nullptr;  // y of two layers, each the other's x
    d.y = l + 1 < m.layers ? at[2 + l % 2] : nullptr;
    d.y_stride = m.state_size;
    d.workspace = at[4];
  }
}

void Stream::run(const float* x, float* y, int64_t steps) {
  const Kernels& k = kernels();
  const Worker alone{0, 1, false, nullptr};
  while (steps > 0) {
    const int64_t count = std::min(steps, kSteps);
    layers_.front().direction[0].x = x;
    layers_.back().direction[0].y = y;
    for (ForwardParams& p : layers_) {
      p.shape.T = count, p.shape.N = count * batch_;
      if (threads_ == 1) {
        k.forward(p, 0, alone);
      } else {
        forward(k, p, threads_);
      }
    }
    x += count * batch_ * model_->input_size;
    y += count * batch_ * model_->state_size;
    steps -= count;
  }
}

void Stream::reset(const uint8_t* rows) {
  const auto clear = [&](float* state, int64_t size) {
    const int64_t count = model_->layers * batch_, width = size / count;
    for (int64_t row = 0; row < count; ++row) {
      if (!rows || rows[row % batch_]) std::memset(state + row * width, 0, width * sizeof(float));
    }
  };
  clear(h_, h_size());
  clear(c_, c_size());
}

}  // namespace cpu
}  // namespace fused_rnn
