// Which instance of the attention kernels runs.
#include "device.cuh"
#include "params.h"

namespace sbert_fast::cuda {

template <class T, int CHUNKS>
void launch_attention(const AttentionParams& p, StreamHandle stream);

namespace {

template <class T>
void launch_dtype(const AttentionParams& p, StreamHandle stream) {
  if (p.D <= 32) {
    launch_attention<T, 1>(p, stream);
  } else if (p.D <= 64) {
    launch_attention<T, 2>(p, stream);
  } else if (p.D <= 96) {
    launch_attention<T, 3>(p, stream);
  } else {
    launch_attention<T, 4>(p, stream);
  }
}

}  // namespace

void launch_varlen_attention(Dtype dtype, const AttentionParams& p, StreamHandle stream) {
  dtype == kFloat16 ? launch_dtype<Half>(p, stream) : launch_dtype<BFloat16>(p, stream);
}

}  // namespace sbert_fast::cuda
