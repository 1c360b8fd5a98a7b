// Launches two of the three kernels of attention. Each head dim and dtype is compiled in a file of
// its own.
//
// Which kernel computes a sequence depends on its length, D, the options and the architecture,
// never on its batch:
//
//   at most 64 tokens   attention_short.cuh
//   longer              attention_long.cuh: every architecture, bias and window
//                       attention_sm90.cuh: compute capability 9.0a, D 32, 64 or 128, neither bias
//                       nor window (launched by attention_sm90.cu)
//
// D is a multiple of 8; the op refuses any other.
#pragma once

#include "attention_long.cuh"
#include "attention_short.cuh"
#include "launch.cuh"

namespace sbert_fast::cuda {

/// Sequences of a block of the short kernel where there is no table of tiles.
inline constexpr int kGroup = 8;

template <class T, int CHUNKS, int BLOCKS, bool PLAIN>
void launch_short(const AttentionParams& p, StreamHandle stream) {
  const int64_t tiles = p.tiles != nullptr ? p.num_tiles : ceil_div(p.B, kGroup);
  // The dead tail has to be cleared even where there is no sequence.
  const int64_t blocks = (tiles > 0 ? tiles : 1) * ceil_div(p.H, kShortHeads<CHUNKS>);
  launch("varlen_attention", attention_short_kernel<T, CHUNKS, BLOCKS, PLAIN>, blocks,
         kShortThreads, 0, stream, p, kGroup);
}

template <class T, int CHUNKS, bool PLAIN>
void launch_long(const AttentionParams& p, StreamHandle stream) {
  using Shape = LongShape<CHUNKS, PLAIN>;
  const int q_blocks = ceil_div(p.max_seqlen, Shape::kQueries);
  const int64_t tiles = p.tiles != nullptr ? p.num_tiles : static_cast<int64_t>(p.B) * q_blocks;
  launch("varlen_attention", attention_long_kernel<T, CHUNKS, PLAIN>, tiles * p.H, Shape::kThreads,
         2 * Buffer<CHUNKS>::kBytes, stream, p, q_blocks);
}

/// Attention of heads of at most 32 * CHUNKS columns; `with_long`: with the sequences that are not
/// short.
template <class T, int CHUNKS>
void launch_attention(const AttentionParams& p, bool with_long, StreamHandle stream) {
  constexpr int kBlocks = kShort / kRows;
  const bool plain = p.bias == nullptr && p.window < 0 && p.scale > 0;
  if (!plain) {
    launch_short<T, CHUNKS, kBlocks, false>(p, stream);
  } else if (p.max_seqlen <= kRows) {
    launch_short<T, CHUNKS, 1, true>(p, stream);
  } else if (p.max_seqlen <= 2 * kRows) {
    launch_short<T, CHUNKS, 2, true>(p, stream);
  } else {
    launch_short<T, CHUNKS, kBlocks, true>(p, stream);
  }
  if (!with_long) return;
  plain ? launch_long<T, CHUNKS, true>(p, stream) : launch_long<T, CHUNKS, false>(p, stream);
}

}  // namespace sbert_fast::cuda
