#include "pool_launch.cuh"

namespace sbert_fast::cuda {

void launch_norm_pool(Dtype dtype, const PoolParams& params, StreamHandle stream) {
  constexpr const char* op = "norm_pool";
  constexpr bool kNorm = true;
  dtype == kFloat16 ? launch_pool<Half, kNorm>(op, params, stream)
                    : launch_pool<BFloat16, kNorm>(op, params, stream);
}

}  // namespace sbert_fast::cuda
