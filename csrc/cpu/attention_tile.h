// Register tiles of attention: the two matrix products of a block of queries and keys.
//
// Both products are sums of outer products, over head dims for the scores and over keys for the
// values. An element adds its terms in that order whatever the shape of the tile, so a row of the
// result does not depend on the rows it is computed with.
#pragma once

#include "vec.h"

// Arrays of accumulators stay in registers only where every loop over them is unrolled.
#define SBF_UNROLL _Pragma("GCC unroll 16")

namespace sbert_fast::cpu::SBF_ISA {

// Accumulators of a tile, rows times vectors. With the vectors of one step and a broadcast they
// must fit the registers (32 on AVX-512 and NEON, 16 on AVX2 and SSE, where a VecF takes two).
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTileVecs = 2;
#elif defined(__AVX2__) || defined(__ARM_NEON)
constexpr int kTileRows = 6, kTileVecs = 2;
#else
constexpr int kTileRows = 6, kTileVecs = 1;
#endif
constexpr int kLanes = kTileVecs * VecF::N;

// How operands are stored and multiplied. Fp32: one value per 32-bit slot.
struct Fp32 {
  static constexpr int kValuesPerSlot = 1;
  static SBF_INLINE VecF multiply_add(VecF a, VecF b, VecF c) { return fma(a, b, c); }
  static SBF_INLINE VecF join(VecF first, VecF) { return first; }
};

template <class T>
struct OperandOf {
  using type = Fp32;
};

#if defined(__AVX512BF16__)
// Two bf16 values per slot, multiplied exactly and added in fp32.
struct Bf16Pairs {
  static constexpr int kValuesPerSlot = 2;
  static SBF_INLINE VecF multiply_add(VecF a, VecF b, VecF c) { return dot_pairs(a, b, c); }
  static SBF_INLINE VecF join(VecF first, VecF second) { return round_pairs(first, second); }
};

template <>
struct OperandOf<bf16> {
  using type = Bf16Pairs;
};
#endif

// acc[r][:] += sum over steps s of a[r * a_row + s * a_step] * b[s * b_step + :].
template <class Operand, int ROWS, int VECS>
SBF_INLINE void accumulate(const float* a, int64_t a_row, int64_t a_step, const float* b,
                           int64_t steps, VecF (&acc)[ROWS][VECS], int64_t b_step = kLanes) {
  for (int64_t s = 0; s < steps; ++s) {
    VecF lanes[VECS];
    SBF_UNROLL for (int v = 0; v < VECS; ++v) lanes[v] = VecF::load(b + s * b_step + v * VecF::N);
    SBF_UNROLL for (int r = 0; r < ROWS; ++r) {
      const VecF x = VecF::set1(a[r * a_row + s * a_step]);
      SBF_UNROLL for (int v = 0; v < VECS; ++v) {
        acc[r][v] = Operand::multiply_add(x, lanes[v], acc[r][v]);
      }
    }
  }
}

// scores[key][query] of some keys (rows) and queries (lanes), and the running maximum per query.
template <class Operand>
struct ScoreTile {
  const float* keys;  // [rows][slots], key_stride apart
  int64_t key_stride;
  const float* queries;  // [slots][kLanes]
  int64_t slots;
  float* scores;       // [rows][kLanes]
  float* maxima;       // [kLanes]
  const float* terms;  // null, or what is added per lane: one to the left for each next key
  float scale;         // multiplies the products where there are terms

  template <int ROWS, int VECS>
  __attribute__((noinline)) void run() const {
    VecF acc[ROWS][VECS];
    SBF_UNROLL for (int r = 0; r < ROWS; ++r) {
      SBF_UNROLL for (int v = 0; v < VECS; ++v) acc[r][v] = VecF::zero();
    }
    accumulate<Operand>(keys, key_stride, 1, queries, slots, acc);
    finish(acc);
  }

  // Adds the terms to the products, stores them, and raises the maxima.
  template <int ROWS, int VECS>
  SBF_INLINE void finish(VecF (&acc)[ROWS][VECS]) const {
    if (terms != nullptr) {
      SBF_UNROLL for (int r = 0; r < ROWS; ++r) {
        SBF_UNROLL for (int v = 0; v < VECS; ++v) {
          acc[r][v] = fma(acc[r][v], VecF::set1(scale), VecF::load(terms - r + v * VecF::N));
        }
      }
    }
    float* const to = scores;  // what is stored cannot change it
    SBF_UNROLL for (int v = 0; v < VECS; ++v) {
      VecF top = VecF::load(maxima + v * VecF::N);
      SBF_UNROLL for (int r = 0; r < ROWS; ++r) {
        top = max(acc[r][v], top);
        acc[r][v].store(to + r * kLanes + v * VecF::N);
      }
      top.store(maxima + v * VecF::N);
    }
  }
};

// out[query][dim] = decay[query] * out + weights times values, for some queries (rows) and dims.
//
// The product is a sum of sums over kRun slots each: the error of a sum grows with its length.
template <class Operand>
struct ValueTile {
  static constexpr int64_t kRun = 32;

  const float* weights;  // [slots][kLanes], from the first query on
  const float* values;   // [slots][kLanes], from the first dim on
  int64_t slots;
  float* out;  // [rows][:], out_stride apart
  int64_t out_stride;
  const float* decay;  // [rows], or null: nothing in out yet

  template <int ROWS, int VECS>
  __attribute__((noinline)) void run() const {
    for (int64_t from = 0; from < slots; from += kRun) {
      const int64_t count = slots - from < kRun ? slots - from : kRun;
      VecF acc[ROWS][VECS];
      SBF_UNROLL for (int r = 0; r < ROWS; ++r) {
        SBF_UNROLL for (int v = 0; v < VECS; ++v) acc[r][v] = VecF::zero();
      }
      accumulate<Operand>(weights + from * kLanes, 1, kLanes, values + from * kLanes, count, acc);
      SBF_UNROLL for (int r = 0; r < ROWS; ++r) {
        const VecF kept = VecF::set1(from == 0 && decay != nullptr ? decay[r] : 1.0f);
        SBF_UNROLL for (int v = 0; v < VECS; ++v) {
          float* const to = out + r * out_stride + v * VecF::N;
          if (from > 0 || decay != nullptr) acc[r][v] = fma(VecF::load(to), kept, acc[r][v]);
          acc[r][v].store(to);
        }
      }
    }
  }
};

template <int VECS, int ROWS = kTileRows, class Tile>
SBF_INLINE void run_rows(const Tile& tile, int64_t rows) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return run_rows<VECS, ROWS - 1>(tile, rows);
  }
  tile.template run<ROWS, VECS>();
}

// Runs `tile` with compile-time sizes; 1 <= rows <= kTileRows, 1 <= vecs <= kTileVecs.
template <int VECS = kTileVecs, class Tile>
SBF_INLINE void run_tile(const Tile& tile, int64_t rows, int64_t vecs) {
  if constexpr (VECS > 1) {
    if (vecs < VECS) return run_tile<VECS - 1>(tile, rows, vecs);
  }
  run_rows<VECS>(tile, rows);
}

// Cuts [0, count) into pieces of at most kTileRows, as even as can be, and calls body(first, rows):
// a tile of one or two rows would wait for the latency of its few accumulators.
template <class Body>
SBF_INLINE void for_each_tile(int64_t count, const Body& body) {
  int64_t first = 0;
  for (int64_t left = (count + kTileRows - 1) / kTileRows; left > 0; --left) {
    const int64_t rows = (count - first + left - 1) / left;
    body(first, rows);
    first += rows;
  }
}

}  // namespace sbert_fast::cpu::SBF_ISA
