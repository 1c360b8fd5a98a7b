// Attention over long sequences on compute capability 9.0a, without bias or window.
//
// qkv [T, 3, H, D] -> out [T, H, D], D 32, 64 or 128. One warp of a block starts copies of queries
// and, 64 at a time, of keys and values, as far ahead as there is shared memory. Two groups of four
// warps have 64 queries each; while the tensor cores multiply weights and values of one block of
// keys (wgmma), the group turns the scores of the next into weights. There are as many blocks of
// threads as multiprocessors; each takes one tile and head after the other.
//
// Numerics: as attention_long.cuh, whose rows have their sums in another order. A copy does not
// stop where a sequence ends: keys behind the end get no weight, values are overwritten with zeros,
// and queries are not stored.
#pragma once

#include "attention_long.cuh"
#include "hopper.cuh"

namespace sbert_fast::cuda {

template <int D>
struct Sm90Shape {
  static constexpr int kRows = 64;  // of every matrix in shared memory
  static constexpr int kGroups = 2;
  static constexpr int kQueries = kGroups * kRows;
  static constexpr int kThreads = (kGroups + 1) * 128;
  /// Columns of a box, as many as a swizzle takes.
  static constexpr int kBox = D < 64 ? D : 64;
  static constexpr int kBoxBytes = kRows * kBox * 2;
  static constexpr int kMatrixBytes = kRows * D * 2;
  static constexpr int kStages = D <= 64 ? 4 : 3;
  static constexpr int kQueryBuffers = 2;
  /// Swizzles count from a multiple of this.
  static constexpr int kAlignment = 1024;
  static constexpr int kSharedBytes =
      kAlignment + (kQueryBuffers * kGroups + 2 * kStages) * kMatrixBytes;
};

/// One buffer's barriers: that it is full, that it may be filled again.
struct Turn {
  Barrier full;
  Barrier empty;
};

template <int D>
struct Sm90Barriers {
  Turn queries[Sm90Shape<D>::kQueryBuffers];
  Turn keys[Sm90Shape<D>::kStages];
  Turn values[Sm90Shape<D>::kStages];
};

/// Where the buffers are, and how many were filled before: buffers are taken in turn.
template <int D>
struct Ring {
  using Shape = Sm90Shape<D>;
  unsigned char* memory;
  Sm90Barriers<D>* barriers;
  int filled_queries = 0;
  int filled_keys = 0;

  SBF_DEVICE unsigned char* queries(int group) const {
    const int buffer = filled_queries % Shape::kQueryBuffers;
    return memory + (buffer * Shape::kGroups + group) * Shape::kMatrixBytes;
  }
  SBF_DEVICE Turn& query_turn() const {
    return barriers->queries[filled_queries % Shape::kQueryBuffers];
  }
  SBF_DEVICE uint32_t query_parity() const { return filled_queries / Shape::kQueryBuffers % 2; }
  static SBF_DEVICE int stage(int filled) { return filled % Shape::kStages; }
  static SBF_DEVICE uint32_t parity(int filled) { return filled / Shape::kStages % 2; }
  SBF_DEVICE unsigned char* keys(int filled) const {
    const int first = Shape::kQueryBuffers * Shape::kGroups;
    return memory + (first + 2 * stage(filled)) * Shape::kMatrixBytes;
  }
  SBF_DEVICE unsigned char* values(int filled) const { return keys(filled) + Shape::kMatrixBytes; }
};

/// The work of a block, item by item: every warp goes through the same.
template <int D, class Do>
SBF_DEVICE void for_each_work(const AttentionParams& p, int items, int q_blocks, const Do& run) {
  constexpr int kQueries = Sm90Shape<D>::kQueries;
  for (int item = block_index(); item < items; item += num_blocks()) {
    const Tile tile = tile_of_queries(p.tiles, p.cu_seqlens, item / p.H, q_blocks, kQueries);
    Cursor cursor = {tile.first, 0};
    for (Work work = next_work(p, tile, kQueries, cursor); work.end != 0;
         work = next_work(p, tile, kQueries, cursor)) {
      run(work, item % p.H);
    }
  }
}

/// One warp: starts the copies of all work of this block.
template <int D>
SBF_DEVICE void produce(const AttentionParams& p, const TensorMap& map, Ring<D> ring, int items,
                        int q_blocks) {
  using Shape = Sm90Shape<D>;
  const auto load = [&](unsigned char* matrix, Barrier* full, int which, int head, int row) {
#pragma unroll
    for (int column = 0; column < D; column += Shape::kBox) {
      load_box(matrix + column / Shape::kBox * Shape::kBoxBytes, map, full, column,
               which * p.H + head, row);
    }
  };
  for_each_work<D>(p, items, q_blocks, [&](const Work& work, int head) {
    const int blocks = ceil_div(work.length, kKeys);
    if (thread_index() % 32 == 0) {
      Turn& turn = ring.query_turn();
      barrier_wait(&turn.empty, ring.query_parity() ^ 1);
      barrier_expect(&turn.full, Shape::kGroups * Shape::kMatrixBytes);
#pragma unroll
      for (int group = 0; group < Shape::kGroups; ++group) {
        const int row = work.start + work.query + group * Shape::kRows;
        load(ring.queries(group), &turn.full, 0, head, row);
      }
      for (int block = 0; block < blocks; ++block) {
        const int filled = ring.filled_keys + block, row = work.start + block * kKeys;
        Turn& keys = ring.barriers->keys[ring.stage(filled)];
        barrier_wait(&keys.empty, ring.parity(filled) ^ 1);
        barrier_expect(&keys.full, Shape::kMatrixBytes);
        load(ring.keys(filled), &keys.full, 1, head, row);
        Turn& values = ring.barriers->values[ring.stage(filled)];
        barrier_wait(&values.empty, ring.parity(filled) ^ 1);
        barrier_expect(&values.full, Shape::kMatrixBytes);
        load(ring.values(filled), &values.full, 2, head, row);
      }
    }
    sync_warp();
    ++ring.filled_queries;
    ring.filled_keys += blocks;
  });
}

/// Scores, and results, as the products of four warps have them: eight columns, then eight more.
SBF_DEVICE auto score_tiles(float (&s)[kKeys / 16][2][4]) -> float (&)[kKeys / 8][4] {
  return reinterpret_cast<float (&)[kKeys / 8][4]>(s);
}
template <int CHUNKS>
SBF_DEVICE auto result_tiles(Result<CHUNKS>& result) -> float (&)[4 * CHUNKS][4] {
  return reinterpret_cast<float (&)[4 * CHUNKS][4]>(result.o);
}

/// The scores of 64 queries and 64 keys.
template <class T, int D>
SBF_DEVICE void begin_scores(float (&s)[kKeys / 16][2][4], const unsigned char* queries,
                             const unsigned char* keys) {
  using Shape = Sm90Shape<D>;
  const uint64_t a = matrix_descriptor(queries, Shape::kBox * 2, 0);
  const uint64_t b = matrix_descriptor(keys, Shape::kBox * 2, 0);
  auto& d = score_tiles(s);
  products_begin();
#pragma unroll
  for (int column = 0; column < D; column += 16) {
    const int bytes = column / Shape::kBox * Shape::kBoxBytes + column % Shape::kBox * 2;
    multiply_described<T>(d, descriptor_behind(a, bytes), descriptor_behind(b, bytes), column > 0);
  }
  products_commit();
}

/// Adds weights times values to the results.
template <class T, int D>
SBF_DEVICE void begin_values(Result<D / kChunk>& result, const uint32_t (&weights)[kKeys / 16][4],
                             const unsigned char* values) {
  using Shape = Sm90Shape<D>;
  const uint64_t b = matrix_descriptor(values, Shape::kBox * 2, Shape::kBoxBytes);
  auto& d = result_tiles(result);
  products_begin();
#pragma unroll
  for (int group = 0; group < kKeys / 16; ++group) {
    const uint64_t rows = descriptor_behind(b, group * 16 * Shape::kBox * 2);
    MultiplyHeld<T, D / 8>::run(d, weights[group], rows);
  }
  products_commit();
}

/// Zeros in the rows from `rows` on of a matrix of values, by the four warps of `group`. Every
/// group does so for itself, over the zeros of another that may already be multiplying by them.
template <int D>
SBF_DEVICE void clear_values(unsigned char* values, int rows, int group) {
  using Shape = Sm90Shape<D>;
  constexpr int kRowBytes = Shape::kBox * 2;
  const int first = rows * kRowBytes + thread_index() % 128 * static_cast<int>(sizeof(Vector));
#pragma unroll
  for (int box = 0; box < D / Shape::kBox; ++box) {
    for (int at = first; at < Shape::kBoxBytes; at += 128 * static_cast<int>(sizeof(Vector))) {
      *reinterpret_cast<Vector*>(values + box * Shape::kBoxBytes + at) = Vector{};
    }
  }
  publish_shared();
  sync_threads(1 + group, 128);
}

/// Four warps: 64 queries of every work of this block.
template <class T, int D>
struct Consumer {
  const AttentionParams& p;
  Ring<D> ring;
  int group;

  /// One lane of a warp tells that the warp needs a buffer no longer.
  static SBF_DEVICE void release(Turn& turn) {
    if (thread_index() % 32 == 0) barrier_arrive(&turn.empty);
  }
  SBF_DEVICE Turn& key_turn(int filled) const { return ring.barriers->keys[ring.stage(filled)]; }
  SBF_DEVICE Turn& value_turn(int filled) const {
    return ring.barriers->values[ring.stage(filled)];
  }

  /// The weights of key block `block`, from its scores.
  SBF_DEVICE void weigh(float (&s)[kKeys / 16][2][4], uint32_t (&weights)[kKeys / 16][4],
                        float (&top)[2], float (&total)[2], float (&shrink)[2], int block,
                        int length) const {
    if ((block + 1) * kKeys > length) {
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        mask_scores<true>(s[i / 2][i % 2], p, 0, 0, block * kKeys + 8 * i, length);
      }
    }
    stream_softmax<T, true>(s, weights, top, total, shrink, p.scale);
  }

  SBF_DEVICE void add_values(Result<D / kChunk>& result, const uint32_t (&weights)[kKeys / 16][4],
                             int block, int length) const {
    const int filled = ring.filled_keys + block;
    barrier_wait(&value_turn(filled).full, ring.parity(filled));
    unsigned char* values = ring.values(filled);
    if ((block + 1) * kKeys > length) clear_values<D>(values, length - block * kKeys, group);
    begin_values<T, D>(result, weights, values);
  }

  /// The rows of one work, and what is known of them after some blocks of keys.
  struct Rows {
    const unsigned char* queries;
    int length;
    Result<D / kChunk> result;
    float top[2];
    float total[2];
  };
  using Weights = uint32_t[kKeys / 16][4];

  /// Scores and new weights of key block `block`, while the values of the one before are added.
  SBF_DEVICE void step(Rows& rows, const Weights& weights, Weights& fresh, int block) const {
    const int filled = ring.filled_keys + block;
    float s[kKeys / 16][2][4], shrink[2];
    barrier_wait(&key_turn(filled).full, ring.parity(filled));
    begin_scores<T, D>(s, rows.queries, ring.keys(filled));
    add_values(rows.result, weights, block - 1, rows.length);
    products_wait<1>();
    products_settle(score_tiles(s));
    release(key_turn(filled));
    weigh(s, fresh, rows.top, rows.total, shrink, block, rows.length);
    products_wait<0>();
    products_settle(result_tiles(rows.result));
    release(value_turn(filled - 1));
    scale_rows(rows.result, shrink);
  }

  SBF_DEVICE void finish(Rows& rows, const Weights& weights, int blocks) const {
    release(ring.query_turn());
    add_values(rows.result, weights, blocks - 1, rows.length);
    products_wait<0>();
    products_settle(result_tiles(rows.result));
    release(value_turn(ring.filled_keys + blocks - 1));
  }

  SBF_DEVICE void attend(const Work& work, int head, int query) const {
    const int blocks = ceil_div(work.length, kKeys), filled = ring.filled_keys;
    Rows rows = {ring.queries(group), work.length, {}, {-infinity(), -infinity()}, {0, 0}};
    Weights even, odd;
    {
      float s[kKeys / 16][2][4], shrink[2];
      barrier_wait(&key_turn(filled).full, ring.parity(filled));
      begin_scores<T, D>(s, rows.queries, ring.keys(filled));
      products_wait<0>();
      products_settle(score_tiles(s));
      release(key_turn(filled));
      weigh(s, even, rows.top, rows.total, shrink, 0, work.length);
    }
    // Two sets of registers in turn: moving one to the other would make the tensor cores wait.
    int block = 1;
    for (; block + 1 < blocks; block += 2) {
      step(rows, even, odd, block);
      step(rows, odd, even, block + 1);
    }
    if (block < blocks) {
      step(rows, even, odd, block);
      finish(rows, odd, blocks);
    } else {
      finish(rows, even, blocks);
    }

    const int width = p.H * p.D, first = query + thread_index() % 128 / 32 * 16;
    T* out = static_cast<T*>(p.out) + static_cast<int64_t>(work.start + first) * width;
    store_stream<T, D / kChunk>(out + head * D, width, work.end - first, D, rows.result,
                                rows.total);
  }

  /// Where the group has no query of the work, it lets the buffers pass.
  SBF_DEVICE void skip(const Work& work) const {
    for (int block = 0; block < ceil_div(work.length, kKeys); ++block) {
      const int filled = ring.filled_keys + block;
      barrier_wait(&key_turn(filled).full, ring.parity(filled));
      release(key_turn(filled));
      barrier_wait(&value_turn(filled).full, ring.parity(filled));
      release(value_turn(filled));
    }
    release(ring.query_turn());
  }

  SBF_DEVICE void run(int items, int q_blocks) {
    for_each_work<D>(p, items, q_blocks, [&](const Work& work, int head) {
      const int query = work.query + group * Sm90Shape<D>::kRows;
      barrier_wait(&ring.query_turn().full, ring.query_parity());
      query < work.end ? attend(work, head, query) : skip(work);
      ++ring.filled_queries;
      ring.filled_keys += ceil_div(work.length, kKeys);
    });
  }
};

template <class T, int D>
SBF_KERNEL(Sm90Shape<D>::kThreads, 1)
attention_sm90_kernel(const SBF_GRID_CONSTANT TensorMap map, const AttentionParams p, int items,
                      int q_blocks) {
  using Shape = Sm90Shape<D>;
  SBF_SHARED Sm90Barriers<D> barriers;
  const uintptr_t memory = reinterpret_cast<uintptr_t>(shared_memory());
  const uintptr_t unaligned = memory % Shape::kAlignment;
  Ring<D> ring = {shared_memory() + (unaligned == 0 ? 0 : Shape::kAlignment - unaligned),
                  &barriers};
  if (thread_index() == 0) {
    constexpr int kTurns = sizeof(barriers) / sizeof(Turn);
    for (int i = 0; i < kTurns; ++i) {
      Turn& turn = reinterpret_cast<Turn*>(&barriers)[i];
      barrier_init(&turn.full, 1);
      barrier_init(&turn.empty, Shape::kGroups * 4);
    }
    barrier_init_done();
  }
  sync_block();
  const int group = thread_index() / 128;
  if (group == Shape::kGroups) {
    give_registers<40>();
    if (thread_index() % 128 < 32) produce<D>(p, map, ring, items, q_blocks);
  } else {
    take_registers<232>();
    Consumer<T, D>{p, ring, group}.run(items, q_blocks);
  }
}

}  // namespace sbert_fast::cuda
