#include "instances.cuh"

namespace fused_rnn {
namespace cuda {

const Recurrence kRnnRelu = Instances<RnnCell<Relu>>::table();

}  // namespace cuda
}  // namespace fused_rnn
