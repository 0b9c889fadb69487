#include "stream.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

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
    : model_(std::move(model)), batch_(batch), threads_(threads), workspace_(nullptr, [](char* p) { std::free(p); }) {
  const FrozenModel& m = *model_;
  if (m.directions != 1) throw std::runtime_error("fused_rnn: a bidirectional model has no streams");
  require("batch", batch, INT32_MAX);
  require("threads", threads, 1024);
  h_.resize(m.layers * batch * m.state_size);
  c_.resize(m.has_c ? m.layers * batch * m.hidden_size : 0);
  for (int i = 0; i < std::min<int64_t>(m.layers - 1, 2); ++i) between_[i].resize(kSteps * batch * m.state_size);
  int64_t workspace = 0;
  for (int64_t l = 0; l < m.layers; ++l) {
    ForwardParams& p = layers_.emplace_back(ForwardParams{m.shape(l), {m.direction(l, 0), {}}});
    LayerShape& s = p.shape;
    s.B = batch;
    for (const int64_t steps : {int64_t(1), kSteps}) {
      s.T = steps, s.N = steps * batch;
      workspace = std::max(workspace, kernels().forward_workspace(s));
    }
    ForwardDirection& d = p.direction[0];
    d.h0 = d.h_n = h_.data() + l * batch * m.state_size;
    d.c = m.has_c ? c_.data() + l * batch * m.hidden_size : nullptr;
    d.x = l ? between_[(l - 1) % 2].data() : nullptr;
    d.y = l + 1 < m.layers ? between_[l % 2].data() : nullptr;
    d.y_stride = m.state_size;
  }
  workspace_.reset(static_cast<char*>(std::aligned_alloc(64, (workspace * 4 + 63) / 64 * 64 + 64)));
  if (!workspace_) throw std::runtime_error("fused_rnn: no memory for a stream");
  for (ForwardParams& p : layers_) p.direction[0].workspace = workspace_.get();
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
        forward(p, threads_);
      }
    }
    x += count * batch_ * model_->input_size;
    y += count * batch_ * model_->state_size;
    steps -= count;
  }
}

void Stream::reset(const uint8_t* rows) {
  const auto clear = [&](std::vector<float>& state) {
    if (state.empty()) return;
    const int64_t width = state.size() / (model_->layers * batch_);
    for (int64_t row = 0; row < model_->layers * batch_; ++row) {
      if (!rows || rows[row % batch_]) std::memset(state.data() + row * width, 0, width * sizeof(float));
    }
  };
  clear(h_);
  clear(c_);
}

}  // namespace cpu
}  // namespace fused_rnn
