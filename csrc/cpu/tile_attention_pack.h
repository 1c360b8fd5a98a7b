// Panels of attention on tiles. A tile is 16 rows of 16 slots, and a slot is a pair of bf16.
//
//   queries   [query][D / 2]: as they lie in qkv, unless something is done to them first
//   keys      [key / 16][D / 32] tiles: a slot holds two dims of a key, its row says which dims,
//             its column which key
//   values    [key / 32][D / 16] tiles: a slot holds a dim of two keys, its row says which keys,
//             its column which dim (zip_rows)
//
// Keys beyond the last one are zeros.
#pragma once

#include "attention_head.h"

namespace sbert_fast::cpu::SBF_ISA {

constexpr int64_t kTileSide = 16, kTileSlots = kTileSide * kTileSide;
constexpr int64_t kStepKeys = 32;  // whose weights fill a tile
constexpr int64_t kStepDims = 32;  // of a query that fill a row of a tile

// Rows of bf16, whatever the vectors are; D is a multiple of kStepDims.
struct Bf16Rows {};

SBF_INLINE void pack_row(Bf16Rows, const bf16* row, int64_t D, float* to) {
  const float* const slots = reinterpret_cast<const float*>(row);  // only copied
  for (int64_t i = 0; i < D / 2; i += VecF::N) VecF::load(slots + i).store(to + i);
}
SBF_INLINE void pack_row(Bf16Rows, const float* row, int64_t D, float* to) {
  bf16* const halves = reinterpret_cast<bf16*>(to);
  for (int64_t d = 0; d < D; d += 2 * VecF::N) {
    store_rounded<bf16>(halves + d, VecF::load(row + d), VecF::load(row + d + VecF::N));
  }
}

SBF_INLINE void clear(float* slots, int64_t count) {
  for (int64_t i = 0; i < count; i += VecF::N) VecF::zero().store(slots + i);
}

// Zeros beyond the first `count` of 16 slots.
SBF_INLINE void keep_first(int64_t count, float* slots) {
  for (int64_t i = 0; i < kTileSide; i += VecF::N) {
    const int there = static_cast<int>(larger(0, smaller(VecF::N, count - i)));
    VecF::load_partial(slots + i, there).store(slots + i);
  }
}

// What is done to rows of q or k on their way to a panel.
struct RowChanges {
  HeadNorm norm;
  Rotary rotary;  // of the first row
  bool any() const { return norm.weight != nullptr || rotary.cos != nullptr; }
};

// tile[slot][row] of 16 rows, `stride` slots apart.
SBF_INLINE void transpose_tile(const float* rows, int64_t stride, float* tile) {
  for (int64_t lane = 0; lane < kTileSide; lane += VecF::N) {
    for (int64_t slot = 0; slot < kTileSide; slot += 4) {
      transpose4(rows + lane * stride + slot, stride, tile + slot * kTileSide + lane, kTileSide);
    }
  }
}

// 16 keys, or the `count` last ones; `readable` rows may be read.
SBF_INLINE void pack_key_tiles(const bf16* keys, int64_t stride, int64_t count, int64_t readable,
                               int64_t D, const RowChanges& changes, float* tiles) {
  alignas(64) float packed[kTileSide * kMaxHeadDim / 2];
  const float* rows = reinterpret_cast<const float*>(keys);
  int64_t slots_apart = stride / 2;
  const bool packs = changes.any() || readable < kTileSide;
  if (packs) {
    slots_apart = D / 2;
    pack_rows<Bf16Rows>(keys, stride, count, D, changes.norm, changes.rotary, packed, slots_apart);
    clear(packed + count * slots_apart, (kTileSide - count) * slots_apart);
    rows = packed;
  }
  for (int64_t d = 0; d < D / kStepDims; ++d) {
    transpose_tile(rows + d * kTileSide, slots_apart, tiles + d * kTileSlots);
  }
  if (packs || count >= kTileSide) return;
  for (float* to = tiles; to < tiles + D / kStepDims * kTileSlots; to += kTileSide) {
    keep_first(count, to);
  }
}

// The values of 32 keys, or of the `count` last ones.
SBF_INLINE void pack_value_tiles(const bf16* values, int64_t stride, int64_t count, int64_t D,
                                 float* tiles) {
  for (int64_t pair = 0; pair < kStepKeys / 2; ++pair) {
    const bf16* const first = values + 2 * pair * stride;
    float* to = tiles + pair * kTileSide;
    for (int64_t d = 0; d < D; d += kStepDims, to += 2 * kTileSlots) {
      if (2 * pair < count) {
        const bf16* const second = 2 * pair + 1 < count ? first + stride + d : nullptr;
        zip_rows(first + d, second, to, to + kTileSlots);
      } else {
        clear(to, kTileSide);
        clear(to + kTileSlots, kTileSide);
      }
    }
  }
}

// Tiles by which weights are added up: rows of ones, as many as there are keys, then zeros.
struct Ones {
  alignas(64) uint32_t pairs[2][2 * kTileSide][kTileSide] = {};

  constexpr Ones() {
    for (int64_t column = 0; column < kTileSide; ++column) {
      for (int64_t row = 0; row < kTileSide; ++row) {
        pairs[0][row][column] = pairs[1][row][column] = 0x3f803f80;
      }
      pairs[1][kTileSide][column] = 0x3f80;  // an odd one
    }
  }

  // 0 < keys <= kStepKeys
  const void* of(int64_t keys) const { return pairs[keys % 2][kTileSide - keys / 2]; }
};
constexpr Ones kOnes;

}  // namespace sbert_fast::cpu::SBF_ISA
