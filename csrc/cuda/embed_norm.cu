#include "launch.cuh"
#include "norms.cuh"

namespace sbert_fast::cuda {
namespace {

template <class T>
void launch_typed(const EmbedNormParams& params, StreamHandle stream) {
  with_row_layout(params.E, [&](auto layout) {
    using Layout = decltype(layout);
    constexpr int64_t kRows = kNormThreads / Layout::kLanes;
    launch("embed_norm", embed_norm_kernel<T, Layout>, (params.T + kRows - 1) / kRows, kNormThreads,
           0, stream, params);
  });
}

}  // namespace

void launch_embed_norm(Dtype dtype, const EmbedNormParams& params, StreamHandle stream) {
  dtype == kFloat16 ? launch_typed<Half>(params, stream) : launch_typed<BFloat16>(params, stream);
}

}  // namespace sbert_fast::cuda
