// The two products of attention on tiles, for 16 queries at a time.
#pragma once

#include "tile_attention_weights.h"
#if defined(SBF_PORTABLE_TILES)
#include "tile_portable.h"
#else
#include "tile_amx.h"
#endif

namespace sbert_fast::cpu::SBF_ISA {

constexpr int64_t kTilesAtOnce = 4;  // of values, next to each other

// A head of a sequence, and the panels of a block of its keys.
struct TileHead {
  HeadRows<bf16> rows;
  const float* queries;  // those that are packed: from which one on
  int64_t packed;
  int64_t key, key_end;        // the block
  const float *keys, *values;  // where those of the first key of the sequence would be
  const float* terms;          // null, or where that of a key at its query is
  bool has_offsets;            // whether a unit was out of reach without
};

// 16 queries of a head, or its last ones.
struct TileUnit {
  TileHead* head;
  int64_t query, rows;
  int64_t step, step_end;  // of 32 keys, with keys that they see
  const void* queries;
  int64_t query_bytes;  // from one to the next
  float *offsets, *weights;
  float* out;  // [D / 16] tiles, and one of sums of weights
  bool has_offsets;
  bool goes_on;  // adds to what is in out
  bool is_last;  // no more keys come

  int64_t keys(int64_t at) const { return smaller(kStepKeys, head->key_end - at * kStepKeys); }
  float* weights_of(int64_t at) const { return weights + (at - step) * kTileSlots; }

  ScoreStep scores(int64_t at, const float* products, VecF c) const {
    const float* const terms = head->terms;
    return {products, offsets, terms == nullptr ? nullptr : terms + at * kStepKeys - query, c};
  }
};

class TileProducts {
 public:
  explicit TileProducts(int64_t D) : D_(D) { tiles_.configure(kTileRowsMax); }

  // scores[2][query][16] of a step; where it has no more than 16 keys, only the first half.
  SBF_INLINE void score(const TileUnit& unit, int64_t step, float* scores) {
    if (D_ > kStepDims) {
      score_half(unit, step, 0, scores);
      score_half(unit, step, 1, scores);
      return;
    }
    const float* const keys = keys_of(unit, step);
    tiles_.load<6>(unit.queries, unit.query_bytes);
    score_tile(keys, scores);
    if (unit.keys(step) > kTileSide) score_tile(keys + kTileSlots, scores + kTileSlots);
  }

  SBF_INLINE void score_half(const TileUnit& unit, int64_t step, int64_t half, float* scores) {
    if (half * kTileSide >= unit.keys(step)) return;
    const float* keys = keys_of(unit, step) + half * kTileSide * D_ / 2;
    const char* const queries = static_cast<const char*>(unit.queries);
    const int64_t bytes = unit.query_bytes;
    tiles_.zero<5>();
    for (int64_t d = 0; d < D_; d += kStepDims, keys += kTileSlots) {
      tiles_.load<6>(queries + d * 2, bytes);
      multiply<5>(keys);
    }
    tiles_.store<5>(scores + half * kTileSlots, kTileRowBytes);
  }

  // Goes on to the values of a unit, which advance() multiplies in left() parts.
  void begin_values(const TileUnit& unit) {
    unit_ = &unit;
    step_ = unit.step;
    tile_ = 0;
    left_ = (unit.step_end - unit.step) * ceil_div(D_ / kTileSide, kTilesAtOnce);
  }

  int64_t left() const { return left_; }

  SBF_INLINE void advance(int64_t count) {
    for (; count > 0; --count, --left_) {
      if (D_ / kTileSide - tile_ >= kTilesAtOnce) {
        multiply_values<kTilesAtOnce>();
      } else {
        multiply_values<kTilesAtOnce / 2>();
      }
    }
  }

 private:
  const float* keys_of(const TileUnit& unit, int64_t step) const {
    return unit.head->keys + step * kStepKeys * D_ / 2;
  }

  SBF_INLINE void score_tile(const float* keys, float* scores) {
    tiles_.zero<5>();
    multiply<5>(keys);
    tiles_.store<5>(scores, kTileRowBytes);
  }

  // A step of some tiles of values.
  template <int TILES>
  SBF_INLINE void multiply_values() {
    const TileUnit& unit = *unit_;
    const int64_t across = D_ / kTileSide;
    float* const out = unit.out + tile_ * kTileSlots;
    float* const sums = unit.out + across * kTileSlots;
    if (step_ == unit.step) begin_sums<TILES>(unit.goes_on, out, sums);
    const float* values = unit.head->values + (step_ * across + tile_) * kTileSlots;
    tiles_.load<6>(unit.weights_of(step_), kTileRowBytes);
    multiply<0>(values);
    multiply<1>(values + kTileSlots);
    if constexpr (TILES > 2) {
      multiply<2>(values + 2 * kTileSlots);
      multiply<3>(values + 3 * kTileSlots);
    }
    if (tile_ == 0) multiply<4>(kOnes.of(unit.keys(step_)));
    if (++step_ < unit.step_end) return;
    store<0>(out), store<1>(out);
    if constexpr (TILES > 2) store<2>(out), store<3>(out);
    if (tile_ == 0) tiles_.store<4>(sums, kTileRowBytes);
    step_ = unit.step;
    tile_ += TILES;
  }

  template <int TILES>
  SBF_INLINE void begin_sums(bool goes_on, const float* out, const float* sums) {
    if (goes_on) {
      load<0>(out), load<1>(out);
      if constexpr (TILES > 2) load<2>(out), load<3>(out);
      tiles_.load<4>(sums, kTileRowBytes);
    } else {
      tiles_.zero<0>(), tiles_.zero<1>(), tiles_.zero<4>();
      if constexpr (TILES > 2) tiles_.zero<2>(), tiles_.zero<3>();
    }
  }

  template <int TILE>
  SBF_INLINE void load(const float* out) {
    tiles_.load<TILE>(out + TILE * kTileSlots, kTileRowBytes);
  }
  template <int TILE>
  SBF_INLINE void store(float* out) {
    tiles_.store<TILE>(out + TILE * kTileSlots, kTileRowBytes);
  }
  template <int SUMS>
  SBF_INLINE void multiply(const void* right) {
    tiles_.load<7>(right, kTileRowBytes);
    tiles_.multiply_add<SUMS, 6, 7>();
  }

  const int64_t D_;
  const TileUnit* unit_ = nullptr;  // whose values are multiplied
  int64_t step_ = 0, tile_ = 0;     // what comes next of them
  int64_t left_ = 0;
  TileRegisters tiles_;
};

}  // namespace sbert_fast::cpu::SBF_ISA
