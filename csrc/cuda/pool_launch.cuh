// Launching the pooling kernel: what its instances are and how many segments a block owns.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "pool.cuh"

namespace sbert_fast::cuda {

/// Blocks that a GPU is kept busy with, where there are that many segments.
inline constexpr int64_t kManyBlocks = 256;

/// Blocks for the segments of a call: short ones share one, long ones have one each.
template <class Layout, bool kNorm>
int64_t count_pool_blocks(const PoolParams& params) {
  const bool one_token = params.mode == kCls || params.mode == kLastToken;
  const int64_t tokens = one_token ? params.segments : params.T;
  int64_t owned = 1;
  if (tokens <= params.segments * kShortTokens) {
    owned = kOwned<Layout, kNorm>;
  } else if (tokens <= params.segments * kMediumTokens) {
    owned = std::max(1, std::min(kOwned<Layout, kNorm>, kPoolThreads<kNorm> / kTeamThreads));
  }
  owned = std::min(owned, std::max<int64_t>(1, params.segments / kManyBlocks));
  return (params.segments + owned - 1) / owned;
}

template <class T, bool kNorm>
void launch_pool(const char* op, const PoolParams& params, StreamHandle stream) {
  with_row_layout(params.E, [&](auto layout) {
    using Layout = decltype(layout);
    launch(op,
           params.mode == kMax ? pool_kernel<T, Layout, kNorm, true>
                               : pool_kernel<T, Layout, kNorm, false>,
           count_pool_blocks<Layout, kNorm>(params), kPoolThreads<kNorm>, 0, stream, params);
  });
}

}  // namespace sbert_fast::cuda
