#include "bias_gelu.cuh"
#include "launch.cuh"

namespace sbert_fast::cuda {
namespace {

template <class T>
void launch_typed(bool tanh, const BiasGeluParams& params, StreamHandle stream) {
  const int64_t threads = (params.T + kGeluRows - 1) / kGeluRows * (params.F / 8);
  launch("bias_gelu", tanh ? bias_gelu_kernel<T, true> : bias_gelu_kernel<T, false>,
         (threads + kGeluThreads - 1) / kGeluThreads, kGeluThreads, 0, stream, params);
}

}  // namespace

void launch_bias_gelu(Dtype dtype, bool tanh, const BiasGeluParams& params, StreamHandle stream) {
  dtype == kFloat16 ? launch_typed<Half>(tanh, params, stream)
                    : launch_typed<BFloat16>(tanh, params, stream);
}

}  // namespace sbert_fast::cuda
