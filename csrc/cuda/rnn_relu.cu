// The kernels of the RNN with ReLU. Each cell has a file of its own, so that they are compiled in parallel.
#include "instances.cuh"

namespace fused_rnn {
namespace cuda {

const Recurrence kRnnRelu = Instances<RnnCell<Relu>>::table();

}  // namespace cuda
}  // namespace fused_rnn
