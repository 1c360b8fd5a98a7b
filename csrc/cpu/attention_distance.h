// Disentangled attention: products of queries and keys with rows of tables that belong to
// distances.
//
// A block of queries and one of keys are at most two blocks of distances apart. The rows of these
// distances are laid out as columns, so that next to each other lie the rows of one key and its
// next queries: a tile of scores reads them as it reads the queries, one column further to the left
// for each next key. Nothing is gathered per score, and no row is multiplied that no score needs.
#pragma once

#include "attention_pack.h"

namespace sbert_fast::cpu::SBF_ISA {

// Columns beyond those of two blocks: rows of a panel do not all begin in the same set of a cache.
constexpr int64_t kDistancePadding = 16;
constexpr int64_t kDistancePanel = 2 * kPanel + kDistancePadding * kMaxHeadDim;

// Rows of the two tables by distance, each [slots][two blocks + kDistancePadding].
struct alignas(64) DistancePanels {
  float position_keys[kDistancePanel];
  float position_queries[kDistancePanel];
};

// columns[slot][x] = row_at(x) for `count` columns and those up to the next whole vector; `rows` is
// scratch for N rows, row_stride apart.
template <class Operand, class RowAt>
SBF_INLINE void pack_columns(int64_t count, int64_t D, int64_t slots, const RowAt& row_at,
                             float* rows, int64_t row_stride, float* columns,
                             int64_t column_stride) {
  for (int64_t x = 0; x < count; x += VecF::N) {
    for (int64_t r = 0; r < VecF::N; ++r) {
      pack_row(Operand{}, row_at(x + r), D, rows + r * row_stride);
    }
    for (int64_t slot = 0; slot < slots; slot += 4) {
      transpose4(rows + slot, row_stride, columns + slot * column_stride + x, column_stride);
    }
  }
}

// A ScoreTile to whose products those with rows of the tables are added: first those of keys with
// rows of position_queries, then those of queries with rows of position_keys. Each is a sum of its
// own until it is complete: the error of a sum grows with its length.
template <class Operand>
struct DistanceTile {
  ScoreTile<Operand> plain;
  // [slots][stride], null where there is no such table; from the distance of the first query and
  // key on, one to the left for each next key.
  const float* position_keys;
  const float* position_queries;
  int64_t stride;

  template <int ROWS, int VECS>
  __attribute__((noinline)) void run() const {
    VecF acc[ROWS][VECS] = {};
    accumulate<Operand>(plain.keys, plain.key_stride, 1, plain.queries, plain.slots, acc);
    if (position_queries != nullptr) {
      VecF sums[ROWS][VECS] = {};
      multiply_keys(sums);
      add(sums, acc);
    }
    if (position_keys != nullptr) {
      VecF sums[ROWS][VECS] = {};
      multiply_queries(sums);
      add(sums, acc);
    }
    plain.finish(acc);
  }

  template <int ROWS, int VECS>
  static SBF_INLINE void add(const VecF (&sums)[ROWS][VECS], VecF (&acc)[ROWS][VECS]) {
    SBF_UNROLL for (int r = 0; r < ROWS; ++r) {
      SBF_UNROLL for (int v = 0; v < VECS; ++v) acc[r][v] = acc[r][v] + sums[r][v];
    }
  }

  template <int ROWS, int VECS>
  SBF_INLINE void multiply_keys(VecF (&sums)[ROWS][VECS]) const {
    for (int64_t s = 0; s < plain.slots; ++s) {
      const float* const columns = position_queries + s * stride;
      SBF_UNROLL for (int r = 0; r < ROWS; ++r) {
        const VecF key = VecF::set1(plain.keys[r * plain.key_stride + s]);
        SBF_UNROLL for (int v = 0; v < VECS; ++v) {
          const VecF row = VecF::load(columns + v * VecF::N - r);
          sums[r][v] = Operand::multiply_add(key, row, sums[r][v]);
        }
      }
    }
  }

  template <int ROWS, int VECS>
  SBF_INLINE void multiply_queries(VecF (&sums)[ROWS][VECS]) const {
    for (int64_t s = 0; s < plain.slots; ++s) {
      const float* const columns = position_keys + s * stride;
      VecF query[VECS];
      SBF_UNROLL for (int v = 0; v < VECS; ++v) {
        query[v] = VecF::load(plain.queries + s * kLanes + v * VecF::N);
      }
      SBF_UNROLL for (int r = 0; r < ROWS; ++r) {
        SBF_UNROLL for (int v = 0; v < VECS; ++v) {
          const VecF row = VecF::load(columns + v * VecF::N - r);
          sums[r][v] = Operand::multiply_add(query[v], row, sums[r][v]);
        }
      }
    }
  }
};

}  // namespace sbert_fast::cpu::SBF_ISA
