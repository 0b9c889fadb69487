#include "instances.cuh"

namespace fused_rnn {
namespace cuda {

const Recurrence kGru = Instances<GruCell>::table();

}  // namespace cuda
}  // namespace fused_rnn
