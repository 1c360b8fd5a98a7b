#include "launch.cuh"
#include "params.h"

namespace sbert_fast::cuda {

#if defined(__CUDACC__)
void use_device(int32_t index) { check(cudaSetDevice(index), "sbert_fast"); }
#else
void use_device(int32_t) {}
#endif

}  // namespace sbert_fast::cuda
