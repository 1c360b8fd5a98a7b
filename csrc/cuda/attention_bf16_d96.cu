#include "attention.cuh"

namespace sbert_fast::cuda {

template void launch_attention<BFloat16, 3>(const AttentionParams&, bool, StreamHandle);

}  // namespace sbert_fast::cuda
