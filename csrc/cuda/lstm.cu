#include "instances.cuh"

namespace fused_rnn {
namespace cuda {

const Recurrence kLstm = Instances<LstmCell>::table();

}  // namespace cuda
}  // namespace fused_rnn
