#include <algorithm>

#include "attention_sm90.cuh"
#include "tensor_map.cuh"

namespace sbert_fast::cuda {
namespace {

constexpr const char* op = "varlen_attention";

template <class T, int D>
void launch_sm90(Dtype dtype, const AttentionParams& p, StreamHandle stream) {
  using Shape = Sm90Shape<D>;
  const int q_blocks = ceil_div(p.max_seqlen, Shape::kQueries);
  const int64_t tiles = p.tiles != nullptr ? p.num_tiles : static_cast<int64_t>(p.B) * q_blocks;
  if (tiles * p.H > INT32_MAX) {
    throw std::runtime_error("varlen_attention: the input is too large for one launch");
  }
  const Boxes boxes = {
      p.qkv, {D, 3 * static_cast<int64_t>(p.H), p.T}, {Shape::kBox, 1, Shape::kRows}};
  const int64_t blocks = std::min<int64_t>(tiles * p.H, num_multiprocessors(op));
  launch(op, attention_sm90_kernel<T, D>, blocks, Shape::kThreads, Shape::kSharedBytes, stream,
         make_tensor_map(op, dtype, boxes), p, static_cast<int>(tiles * p.H), q_blocks);
}

template <class T>
void launch_dtype(Dtype dtype, const AttentionParams& p, StreamHandle stream) {
  if (p.D == 32) {
    launch_sm90<T, 32>(dtype, p, stream);
  } else if (p.D == 64) {
    launch_sm90<T, 64>(dtype, p, stream);
  } else {
    launch_sm90<T, 128>(dtype, p, stream);
  }
}

}  // namespace

bool launch_long_sm90(Dtype dtype, const AttentionParams& p, StreamHandle stream) {
  const bool plain = p.bias == nullptr && p.window < 0 && p.scale > 0;
  const bool fits = p.D == 32 || p.D == 64 || p.D == 128;
  if (!plain || !fits || !is_sm90(op)) return false;
  dtype == kFloat16 ? launch_dtype<Half>(dtype, p, stream)
                    : launch_dtype<BFloat16>(dtype, p, stream);
  return true;
}

}  // namespace sbert_fast::cuda
