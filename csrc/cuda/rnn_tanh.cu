#include "instances.cuh"

namespace fused_rnn {
namespace cuda {

const Recurrence kRnnTanh = Instances<RnnCell<Tanh>>::table();

}  // namespace cuda
}  // namespace fused_rnn
