// What the attention kernels share: rows of a head in registers, masks, softmax.
//
// Four neighbouring lanes hold a row of 32 columns, 16 bytes each: lane c of them the columns
// 8c .. 8c + 7, two to a word. The contraction over columns takes words 0 and 1, then 2 and 3, as
// its sixteen terms; q and k agree about the order, so it is as good as any, and rows come from
// memory in whole vectors. Values have their columns in the same order, so rows of the result are
// stored in whole vectors too.
#pragma once

#include "attention_index.h"
#include "device.cuh"
#include "params.h"

namespace sbert_fast::cuda {

/// Rows g and g + 8 of sixteen, in lane 4g + c.
template <int CHUNKS>
struct RowPair {
  Vector row[2][CHUNKS];
};

/// Where lane 4g + c finds its columns of row g, in numbers, of rows `stride` numbers apart. The
/// rows of a tile are near enough for 32 bits, which take a third of the instructions of 64.
SBF_DEVICE uint32_t lane_offset(int stride) {
  const int lane = thread_index() % 32;
  return static_cast<uint32_t>(lane / 4 * stride + lane % 4 * 8);
}

/// Rows g and g + 8 behind `base`, `stride` numbers apart; zeros where they are not among the first
/// `rows`, and from column D on.
template <class T, int CHUNKS>
SBF_DEVICE RowPair<CHUNKS> load_rows(const T* base, int stride, int rows, int D) {
  const int lane = thread_index() % 32, column = lane % 4 * 8;
  const T* at = base + lane_offset(stride);
  RowPair<CHUNKS> pair;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const bool live = lane / 4 + 8 * half < rows && chunk * kChunk + column < D;
      pair.row[half][chunk] = live ? load_16(at + chunk * kChunk) : Vector{};
    }
    at += static_cast<uint32_t>(8 * stride);
  }
  return pair;
}

/// Sixteen queries as the tensor cores take them, sixteen columns at a time.
template <int CHUNKS>
struct QueryRows {
  uint32_t a[CHUNKS][2][4];

  SBF_DEVICE void assign(const RowPair<CHUNKS>& rows) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        a[chunk][i / 4][i % 4] = rows.row[i % 2][chunk].word[i / 4 * 2 + i % 4 / 2];
      }
    }
  }
};

/// Adds the scores of sixteen queries and sixteen keys: s[0] of the first eight, s[1] of the
/// others.
template <class T, int CHUNKS>
SBF_DEVICE void multiply_scores(float (&s)[2][4], const QueryRows<CHUNKS>& q,
                                const RowPair<CHUNKS>& k) {
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t* keys = k.row[half][chunk].word + 2 * step;
        mma_16x8x16<T>(s[half], q.a[chunk][step], keys[0], keys[1]);
      }
    }
  }
}

/// The accumulator of a row of results: lane 4g + c has columns 8c .. 8c + 7 of rows g and g + 8,
/// o[chunk][word][0..1] and [2..3].
template <int CHUNKS>
struct Result {
  float o[CHUNKS][4][4];
};

/// Adds the weights of sixteen keys, in the layout of scores, times their values.
template <class T, int CHUNKS>
SBF_DEVICE void multiply_values(Result<CHUNKS>& result, const float (&weights)[2][4],
                                const RowPair<CHUNKS>& v) {
  const uint32_t a[4] = {
      pack<T>(weights[0][0], weights[0][1]), pack<T>(weights[0][2], weights[0][3]),
      pack<T>(weights[1][0], weights[1][1]), pack<T>(weights[1][2], weights[1][3])};
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const uint32_t b0 = transpose_8x8(v.row[0][chunk].word[word]);
      const uint32_t b1 = transpose_8x8(v.row[1][chunk].word[word]);
      mma_16x8x16<T>(result.o[chunk][word], a, b0, b1);
    }
  }
}

/// Stores rows g and g + 8 behind `base`, those among the first `rows`, each times its factor.
template <class T, int CHUNKS>
SBF_DEVICE void store_rows(T* base, int stride, int rows, int D, const Result<CHUNKS>& result,
                           const float (&factor)[2]) {
  const int lane = thread_index() % 32, column = lane % 4 * 8;
  T* at = base + lane_offset(stride);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      Vector v;
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const float* pair = result.o[chunk][word] + 2 * half;
        v.word[word] = pack<T>(pair[0] * factor[half], pair[1] * factor[half]);
      }
      const bool live = lane / 4 + 8 * half < rows && chunk * kChunk + column < D;
      if (live) store_16(at + chunk * kChunk, v);
    }
    at += static_cast<uint32_t>(8 * stride);
  }
}

/// Turns products into logits in units of log2, -infinity where there is no key: of a 16 x 8 block
/// whose first query and key have the positions `query` and `key`. PLAIN leaves the scale to
/// exponentials(), one operation less on every score.
template <bool PLAIN>
SBF_DEVICE void mask_scores(float (&s)[4], const AttentionParams& p, int head, int query, int key,
                            int length) {
  constexpr float kLog2E = 1.4426950408889634f;
  const int lane = thread_index() % 32;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int k = key + lane % 4 * 2 + e % 2;
    bool seen = k < length;
    if (!PLAIN) {
      const int distance = k - (query + lane / 4 + e / 2 * 8);
      seen = seen && in_window(distance, p.window);
      s[e] *= p.scale;
      if (p.bias != nullptr) {
        const int64_t row = static_cast<int64_t>(head) * (2 * p.R + 1);
        s[e] = fma(p.bias[row + bias_column(distance, p.R)], kLog2E, s[e]);
      }
    }
    s[e] = seen ? s[e] : -infinity();
  }
}

/// Largest, or sum, over the four lanes of a row.
SBF_DEVICE float row_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
SBF_DEVICE float row_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

/// Zeros in the rows [cu_seqlens[B], T) of the result, shared out among all blocks.
template <class T>
SBF_DEVICE void clear_dead_tail(const AttentionParams& p) {
  const int64_t row = static_cast<int64_t>(p.H) * p.D * sizeof(T);
  const int64_t end = p.T * row;
  const int64_t step = static_cast<int64_t>(num_blocks()) * block_threads() * sizeof(Vector);
  int64_t at = p.cu_seqlens[p.B] * row +
               (static_cast<int64_t>(block_index()) * block_threads() + thread_index()) *
                   static_cast<int64_t>(sizeof(Vector));
  for (; at < end; at += step) store_16(static_cast<unsigned char*>(p.out) + at, Vector{});
}

}  // namespace sbert_fast::cuda
