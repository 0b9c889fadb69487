// The kernels of the GRU. Each cell has a file of its own, so that they are compiled in parallel.
#include "instances.cuh"

namespace fused_rnn {
namespace cuda {

const Recurrence kGru = Instances<GruCell>::table();

}  // namespace cuda
}  // namespace fused_rnn
