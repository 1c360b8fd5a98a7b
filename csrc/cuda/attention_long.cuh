// Attention over long sequences: a block of threads has up to 128 queries of one head, and the keys
// and values of their sequence pass through shared memory, 64 at a time, in two buffers (cp.async,
// mma.sync), with the streaming softmax.
//
// qkv [T, 3, H, D] -> out [T, H, D]. Numerics: fp32 scores, sums and results; weights are rounded
// to T before they meet v. Key blocks are counted from the start of the sequence, so that a row has
// the same terms in the same order wherever its tile begins. What lies behind the end of the
// sequence is filled in with zeros, not loaded.
#pragma once

#include "attention_fragments.cuh"

namespace sbert_fast::cuda {

template <int CHUNKS, bool PLAIN>
struct LongShape {
  static constexpr int kQueries = 128;
  /// Sixteen-row matrices of a warp: two share what is read of shared memory where registers allow.
  static constexpr int kMatrices = PLAIN && CHUNKS <= 2 ? 2 : 1;
  /// Blocks on a multiprocessor, at the least.
  static constexpr int kBlocks = PLAIN && CHUNKS <= 2 ? 2 : 1;
  static constexpr int kThreads = kQueries / (16 * kMatrices) * 32;
};

/// A buffer of shared memory: 64 keys, then their values.
template <int CHUNKS>
struct Buffer {
  /// Numbers of a row.
  static constexpr int kWidth = CHUNKS <= 2 ? CHUNKS * kChunk : 128;
  static constexpr int kValues = kKeys * kWidth * 2;  // where the values begin
  static constexpr int kBytes = 2 * kValues;
};

/// Start copying the keys and values [key, key + 64) of a sequence of `length`.
template <class T, int CHUNKS, int THREADS>
SBF_DEVICE void copy_keys(unsigned char* buffer, const T* k_rows, int width, int key, int length,
                          int D) {
  constexpr int kVectors = CHUNKS * kChunk / 8, kWidth = Buffer<CHUNKS>::kWidth;
  const T* base = k_rows + static_cast<int64_t>(key) * 3 * width;
#pragma unroll 1
  for (int index = thread_index(); index < kKeys * kVectors; index += THREADS) {
    const int row = index / kVectors, column = index % kVectors * 8;
    const bool live = key + row < length && column < D;
    const T* k = base + (live ? static_cast<uint32_t>(row * 3 * width + column) : 0u);
    copy_async_16(buffer + offset_by_pairs(row, column, kWidth), k, live);
    unsigned char* values = buffer + Buffer<CHUNKS>::kValues;
    copy_async_16(values + offset_by_columns(row, column, kWidth), k + width, live);
  }
  copy_async_commit();
}

/// Keys `first + g` and `first + g + 8` of a buffer.
template <int CHUNKS>
SBF_DEVICE RowPair<CHUNKS> keys_of(const unsigned char* buffer, int first) {
  const int lane = thread_index() % 32;
  RowPair<CHUNKS> pair;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int row = first + lane / 4 + 8 * half, column = chunk * kChunk + lane % 4 * 8;
      const int offset = offset_by_pairs(row, column, Buffer<CHUNKS>::kWidth);
      pair.row[half][chunk] = *reinterpret_cast<const Vector*>(buffer + offset);
    }
  }
  return pair;
}

/// One warp's queries, their results so far in columns 8j + 2c and the next of o[chunk][j].
template <int CHUNKS, int MATRICES>
struct Queries {
  QueryRows<CHUNKS> q[MATRICES];
  Result<CHUNKS> result[MATRICES];
  float top[MATRICES][2];
  float total[MATRICES][2];
};

/// Turns the scores of one matrix into weights relative to the largest score of each row so far.
/// Results so far are relative to the largest one before: `shrink` is the factor that they lack.
template <class T, bool PLAIN>
SBF_DEVICE void stream_softmax(const float (&s)[kKeys / 16][2][4],
                               uint32_t (&weights)[kKeys / 16][4], float (&top)[2],
                               float (&total)[2], float (&shrink)[2], float scale) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float largest = top[row];
#pragma unroll
    for (int group = 0; group < kKeys / 16; ++group) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        largest = fmaxf(largest, s[group][e / 2][2 * row + e % 2]);
      }
    }
    largest = row_max(largest);
    // Outside of its window a row has no key at all.
    const float origin = (!PLAIN && largest == -infinity() ? 0.0f : largest) * scale;
    shrink[row] = exp2_approx(fma(top[row], scale, -origin));
    top[row] = largest;
    float sum = 0;
#pragma unroll
    for (int group = 0; group < kKeys / 16; ++group) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* pair = s[group][half] + 2 * row;
        const float low = exp2_approx(fma(pair[0], scale, -origin));
        const float high = exp2_approx(fma(pair[1], scale, -origin));
        weights[group][2 * half + row] = pack<T>(low, high);
        sum += low + high;
      }
    }
    total[row] = fma(total[row], shrink[row], sum);
  }
}

template <int CHUNKS>
SBF_DEVICE void scale_rows(Result<CHUNKS>& result, const float (&factor)[2]) {
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
#pragma unroll
      for (int e = 0; e < 4; ++e) result.o[chunk][word][e] *= factor[e / 2];
    }
  }
}

/// Adds weights times values of a buffer, sixteen keys at a time.
template <class T, int CHUNKS, int MATRICES>
SBF_DEVICE void add_values(Result<CHUNKS> (&result)[MATRICES],
                           const uint32_t (&weights)[MATRICES][kKeys / 16][4],
                           const unsigned char* values) {
  const int lane = thread_index() % 32;
#pragma unroll
  for (int group = 0; group < kKeys / 16; ++group) {
#pragma unroll
    for (int word = 0; word < CHUNKS * 4; word += 2) {
      const int row = group * 16 + lane % 16, column = (word + lane / 16) * 8;
      const int offset = offset_by_columns(row, column, Buffer<CHUNKS>::kWidth);
      const Vector b = load_matrices_transposed(values + offset);
#pragma unroll
      for (int m = 0; m < MATRICES; ++m) {
        mma_16x8x16<T>(result[m].o[word / 4][word % 4], weights[m][group], b.word[0], b.word[1]);
        mma_16x8x16<T>(result[m].o[word / 4][word % 4 + 1], weights[m][group], b.word[2],
                       b.word[3]);
      }
    }
  }
}

/// One buffer of keys, whose first is `key`; the queries of this warp begin at `query`.
template <class T, int CHUNKS, bool PLAIN, int MATRICES>
SBF_DEVICE void attend_keys(const AttentionParams& p, Queries<CHUNKS, MATRICES>& x,
                            const unsigned char* buffer, int head, int query, int key, int length) {
  float s[MATRICES][kKeys / 16][2][4] = {};
#pragma unroll
  for (int group = 0; group < kKeys / 16; ++group) {
    const RowPair<CHUNKS> k = keys_of<CHUNKS>(buffer, group * 16);
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) multiply_scores<T, CHUNKS>(s[m][group], x.q[m], k);
  }
  if (!PLAIN || key + kKeys > length) {
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        mask_scores<PLAIN>(s[m][i / 2][i % 2], p, head, query + 16 * m, key + 8 * i, length);
      }
    }
  }
  const float scale = PLAIN ? p.scale : 1.0f;
  uint32_t weights[MATRICES][kKeys / 16][4];
#pragma unroll
  for (int m = 0; m < MATRICES; ++m) {
    float shrink[2];
    stream_softmax<T, PLAIN>(s[m], weights[m], x.top[m], x.total[m], shrink, scale);
    scale_rows(x.result[m], shrink);
  }
  add_values<T, CHUNKS>(x.result, weights, buffer + Buffer<CHUNKS>::kValues);
}

/// Stores rows g and g + 8 of one matrix behind `base`, those among the first `rows`.
template <class T, int CHUNKS>
SBF_DEVICE void store_stream(T* base, int stride, int rows, int D, const Result<CHUNKS>& result,
                             const float (&total)[2]) {
  const int lane = thread_index() % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = reciprocal(row_sum(total[half]));
    const int row = lane / 4 + 8 * half;
    T* at = base + static_cast<uint32_t>(row * stride + lane % 4 * 2);
#pragma unroll
    for (int word = 0; word < CHUNKS * 4; ++word) {
      const float* pair = result.o[word / 4][word % 4] + 2 * half;
      const uint32_t rounded = pack<T>(pair[0] * factor, pair[1] * factor);
      if (row < rows && word * 8 < D) *reinterpret_cast<uint32_t*>(at + word * 8) = rounded;
    }
  }
}

/// What a block of threads does next: the queries [query, end) of the sequence of `length` rows at
/// token `start`. Nothing where `end` is 0.
struct Work {
  int start;
  int length;
  int query;
  int end;
};

/// Where the search for work goes on: at this sequence, from this query on.
struct Cursor {
  int sequence;
  int query;
};

/// The next long sequence of the tile, or the next queries of the last one. Called by a whole warp.
SBF_DEVICE Work next_work(const AttentionParams& p, const Tile& tile, int queries, Cursor& cursor) {
  const int lane = thread_index() % 32;
  int sequence = cursor.sequence, query = cursor.query;
  while (sequence < tile.last) {
    int start = 0, length = 0;
    if (sequence + lane < tile.last) {
      start = p.cu_seqlens[sequence + lane];
      length = p.cu_seqlens[sequence + lane + 1] - start;
    }
    const uint32_t found = ballot(length > kShort);
    if (found == 0) {
      sequence += 32;
      query = 0;
      continue;
    }
    const int owner = count_trailing_zeros(found);
    const int from = shuffle(start, owner), rows = shuffle(length, owner);
    if (owner != 0) query = 0;
    const int first = tile.q_start - from > query ? tile.q_start - from : query;
    const int last = tile.q_end - from < rows ? tile.q_end - from : rows;
    if (first < last) {
      cursor = {sequence + owner, first + queries};
      return {from, rows, first, last - first < queries ? last : first + queries};
    }
    sequence += owner + 1;
    query = 0;
  }
  return {0, 0, 0, 0};
}

/// The queries of `work` of one head.
template <class T, int CHUNKS, bool PLAIN>
SBF_DEVICE void attend_long(const AttentionParams& p, const Work& work, int head) {
  constexpr int kMatrices = LongShape<CHUNKS, PLAIN>::kMatrices;
  constexpr int kThreads = LongShape<CHUNKS, PLAIN>::kThreads;
  const int width = p.H * p.D;
  const T* q_rows =
      static_cast<const T*>(p.qkv) + static_cast<int64_t>(work.start) * 3 * width + head * p.D;
  const int first = work.query + thread_index() / 32 * 16 * kMatrices;

  const Keys keys = visible_keys(work.query, work.end, work.length, p.window, kKeys);
  copy_keys<T, CHUNKS, kThreads>(shared_memory(), q_rows + width, width, keys.first, work.length,
                                 p.D);
  Queries<CHUNKS, kMatrices> x{};
#pragma unroll
  for (int m = 0; m < kMatrices; ++m) {
    const int query = first + 16 * m;
    const T* rows = q_rows + static_cast<int64_t>(query) * 3 * width;
    x.q[m].assign(load_rows<T, CHUNKS>(rows, 3 * width, work.end - query, p.D));
    x.top[m][0] = x.top[m][1] = -infinity();
  }
  int turn = 0;
  for (int key = keys.first; key < keys.last; key += kKeys, turn ^= 1) {
    const unsigned char* buffer = shared_memory() + turn * Buffer<CHUNKS>::kBytes;
    if (key + kKeys < keys.last) {
      unsigned char* other = shared_memory() + (turn ^ 1) * Buffer<CHUNKS>::kBytes;
      copy_keys<T, CHUNKS, kThreads>(other, q_rows + width, width, key + kKeys, work.length, p.D);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    sync_block();
    attend_keys<T, CHUNKS, PLAIN>(p, x, buffer, head, first, key, work.length);
    sync_block();
  }
#pragma unroll
  for (int m = 0; m < kMatrices; ++m) {
    const int query = first + 16 * m;
    T* rows = static_cast<T*>(p.out) + static_cast<int64_t>(work.start + query) * width;
    store_stream<T, CHUNKS>(rows + head * p.D, width, work.end - query, p.D, x.result[m],
                            x.total[m]);
  }
}

/// One head of the sequences of one tile that are not short.
template <class T, int CHUNKS, bool PLAIN>
SBF_KERNEL((LongShape<CHUNKS, PLAIN>::kThreads), (LongShape<CHUNKS, PLAIN>::kBlocks))
attention_long_kernel(const AttentionParams p, int q_blocks) {
  constexpr int kQueries = LongShape<CHUNKS, PLAIN>::kQueries;
  // In shared memory they take no registers from the loop over keys.
  SBF_SHARED Work work;
  SBF_SHARED Cursor cursor;
  SBF_SHARED Tile tile;
  if (thread_index() == 0) {
    tile = tile_of_queries(p.tiles, p.cu_seqlens, block_index() / p.H, q_blocks, kQueries);
    cursor = {tile.first, 0};
  }
  while (true) {
    sync_block();
    if (thread_index() / 32 == 0) {
      Cursor next = cursor;
      const Work found = next_work(p, tile, kQueries, next);
      sync_warp();
      if (thread_index() == 0) {
        work = found;
        cursor = next;
      }
    }
    sync_block();
    if (work.end == 0) return;
    attend_long<T, CHUNKS, PLAIN>(p, work, block_index() % p.H);
  }
}

}  // namespace sbert_fast::cuda
