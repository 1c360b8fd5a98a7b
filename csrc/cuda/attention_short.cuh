// Attention over short sequences: out = softmax(scale q k^T + bias) v, a sequence and head at a
// time.
//
// qkv [T, 3, H, D] -> out [T, H, D]. A warp computes sixteen queries of one head of one sequence
// and has the scores of all its keys in registers: one pass, no rescaling, no shared memory. Keys
// and values come from memory in the layout of the tensor cores (attention_fragments.cuh), and
// values are transposed between registers (movmatrix). A block of threads takes one tile of the
// planner's; the query blocks of a sequence run side by side in it, so that they find keys and
// values in the L1 cache.
//
// Numerics: fp32 scores and sums; weights are rounded to T before they meet v. Nothing of a
// sequence meets another: what lies behind its end is not loaded.
#pragma once

#include "attention_fragments.cuh"

namespace sbert_fast::cuda {

inline constexpr int kShortThreads = 128;

/// Blocks on a multiprocessor, at the least: they are what hides the latency of loads.
constexpr int short_blocks(int chunks, int blocks) {
  if (chunks == 1) return blocks == 1 ? 6 : blocks == 2 ? 4 : 3;
  if (chunks == 2) return blocks == 1 ? 4 : blocks == 2 ? 3 : 2;
  return blocks == 1 ? 3 : 2;
}

/// Sixteen queries, from `query` on, of the sequence of `length` rows at token `start`.
///
/// BLOCKS: blocks of sixteen keys that a sequence has at the most.
template <class T, int CHUNKS, int BLOCKS, bool PLAIN>
SBF_DEVICE void attend_short(const AttentionParams& p, int64_t start, int length, int head,
                             int query) {
  const int width = p.H * p.D;
  const T* q_rows = static_cast<const T*>(p.qkv) + start * 3 * width + head * p.D;
  const T* k_rows = q_rows + width;
  const T* v_rows = k_rows + width;
  const auto load = [&](const T* rows, int first) {
    const T* base = rows + static_cast<uint32_t>(first * 3 * width);
    return load_rows<T, CHUNKS>(base, 3 * width, length - first, p.D);
  };

  QueryRows<CHUNKS> q;
  q.assign(load(q_rows, query));
  // As many blocks under way as registers allow: latency is what short sequences wait for.
  constexpr int kAhead = CHUNKS <= 2 || BLOCKS == 1 ? BLOCKS : PLAIN ? 2 : 1;
  RowPair<CHUNKS> rows[kAhead];
#pragma unroll
  for (int block = 0; block < kAhead; ++block) rows[block] = load(k_rows, block * kRows);
  float s[BLOCKS][2][4];
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[block][0][e] = s[block][1][e] = 0;
    if (block * kRows < length) multiply_scores<T, CHUNKS>(s[block], q, rows[block % kAhead]);
    if (block + kAhead < BLOCKS) rows[block % kAhead] = load(k_rows, (block + kAhead) * kRows);
  }
#pragma unroll
  for (int block = 0; block < kAhead; ++block) rows[block] = load(v_rows, block * kRows);

  float top[2] = {-infinity(), -infinity()};
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
    if (block * kRows >= length) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!PLAIN || (block + 1) * kRows > length) {
        mask_scores<PLAIN>(s[block][half], p, head, query, block * kRows + half * 8, length);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) top[e / 2] = fmaxf(top[e / 2], s[block][half][e]);
    }
  }
  const float scale = PLAIN ? p.scale : 1.0f;
  float total[2] = {0, 0};
#pragma unroll
  for (int row = 0; row < 2; ++row) top[row] = row_max(top[row]) * scale;
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
    if (block * kRows >= length) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& weight = s[block][half][e];
        weight = exp2_approx(fma(weight, scale, -top[e / 2]));
        total[e / 2] += weight;
      }
    }
  }

  Result<CHUNKS> result{};
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
    if (block * kRows < length) {
      multiply_values<T, CHUNKS>(result, s[block], rows[block % kAhead]);
    }
    if (block + kAhead < BLOCKS) rows[block % kAhead] = load(v_rows, (block + kAhead) * kRows);
  }
  const float factor[2] = {reciprocal(row_sum(total[0])), reciprocal(row_sum(total[1]))};
  T* out = static_cast<T*>(p.out) + (start + query) * width + head * p.D;
  store_rows<T, CHUNKS>(out, width, length - query, p.D, result, factor);
}

/// Heads of a block of threads: their loads are neighbours in a line of the cache.
template <int CHUNKS>
inline constexpr int kShortHeads = CHUNKS == 1 ? 2 : 1;

/// The sequences of one tile that are short, some heads of them; and the dead tail.
///
/// Warps take items in turn: of a sequence the heads of a query block, then the next query block.
template <class T, int CHUNKS, int BLOCKS, bool PLAIN>
SBF_KERNEL(kShortThreads, short_blocks(CHUNKS, BLOCKS))
attention_short_kernel(const AttentionParams p, int group) {
  clear_dead_tail<T>(p);
  constexpr int kHeads = kShortHeads<CHUNKS>;
  const int head_groups = ceil_div(p.H, kHeads);
  const Tile tile = tile_of_sequences(p.tiles, block_index() / head_groups, group, p.B);
  const int first_head = block_index() % head_groups * kHeads;
  const int lane = thread_index() % 32, warp = thread_index() / 32;

  for (int base = tile.first; base < tile.last; base += 32) {
    const int sequence = base + lane;
    int start = 0, length = 0;
    if (sequence < tile.last) {
      start = p.cu_seqlens[sequence];
      length = p.cu_seqlens[sequence + 1] - start;
    }
    if (length > kShort) length = 0;
    const int blocks = ceil_div(length, kRows);
    int behind = blocks;  // query blocks of this sequence and those before it
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = shuffle_up(behind, distance);
      if (lane >= distance) behind += other;
    }
    const int items = shuffle(behind, 31) * kHeads;
    for (int item = warp; item < items; item += kShortThreads / 32) {
      const int block = item / kHeads, head = first_head + item % kHeads;
      const int owner = count_trailing_zeros(ballot(behind > block));
      const int query = (block - shuffle(behind - blocks, owner)) * kRows;
      const int64_t first = shuffle(start, owner);
      const int rows = shuffle(length, owner);
      if (head < p.H) attend_short<T, CHUNKS, BLOCKS, PLAIN>(p, first, rows, head, query);
    }
  }
}

}  // namespace sbert_fast::cuda
