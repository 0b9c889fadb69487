// The kernels of the LSTM. Each cell has a file of its own, so that they are compiled in parallel.
#include "instances.cuh"

namespace fused_rnn {
namespace cuda {

const Recurrence kLstm = Instances<LstmCell>::table();

}  // namespace cuda
}  // namespace fused_rnn
