// Which instance of the attention kernels runs.
#include "attention_index.h"
#include "device.cuh"
#include "params.h"

namespace sbert_fast::cuda {

template <class T, int CHUNKS>
void launch_attention(const AttentionParams& p, bool with_long, StreamHandle stream);

namespace {

template <class T>
void launch_dtype(const AttentionParams& p, bool with_long, StreamHandle stream) {
  if (p.D <= 32) {
    launch_attention<T, 1>(p, with_long, stream);
  } else if (p.D <= 64) {
    launch_attention<T, 2>(p, with_long, stream);
  } else if (p.D <= 96) {
    launch_attention<T, 3>(p, with_long, stream);
  } else {
    launch_attention<T, 4>(p, with_long, stream);
  }
}

}  // namespace

void launch_varlen_attention(Dtype dtype, const AttentionParams& p, StreamHandle stream) {
  bool with_long = p.max_seqlen > kShort;
#if defined(SBF_WITH_SM90)
  if (with_long && launch_long_sm90(dtype, p, stream)) with_long = false;
#endif
  dtype == kFloat16 ? launch_dtype<Half>(p, with_long, stream)
                    : launch_dtype<BFloat16>(p, with_long, stream);
}

}  // namespace sbert_fast::cuda
