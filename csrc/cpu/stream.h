// A stream: the state of a frozen model for some rows, which advances by one step or several at a time.
//
// All memory is allocated on creation. A step allocates nothing, takes no lock and, on one thread, makes no system
// call. Streams share their model; one stream must not be used by two threads at the same time.
#pragma once

#include <memory>
#include <vector>

#include "frozen_model.h"

namespace fused_rnn {
namespace cpu {

class FUSED_RNN_EXPORT Stream {
 public:
  // Throws std::runtime_error if the model is bidirectional, batch or threads are out of range, or memory is lacking.
  Stream(std::shared_ptr<const FrozenModel> model, int64_t batch, int64_t threads);

  // x: [steps, B, I], y: [steps, B, P] out; they must not overlap.
  void run(const float* x, float* y, int64_t steps);
  // Sets the state of the rows that are not 0, or of all rows if `rows` is null, to zeros.
  void reset(const uint8_t* rows);

  const FrozenModel& model() const { return *model_; }
  int64_t batch() const { return batch_; }
  float* h() { return h_; }  // [L, B, P]
  float* c() { return c_; }  // [L, B, H]; of an LSTM, else empty
  int64_t h_size() const { return model_->layers * batch_ * model_->state_size; }
  int64_t c_size() const { return model_->has_c ? model_->layers * batch_ * model_->hidden_size : 0; }

 private:
  static constexpr int64_t kSteps = 24;  // that a layer takes before the next: enough rows to multiply x at once

  std::shared_ptr<const FrozenModel> model_;
  int64_t batch_, threads_;
  std::vector<ForwardParams> layers_;
  std::unique_ptr<char, void (*)(void*)> memory_;  // of the state and all that the kernels need
  float *h_, *c_;
};

}  // namespace cpu
}  // namespace fused_rnn
