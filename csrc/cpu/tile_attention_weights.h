// From scores to weights, for attention on tiles: a row of a tile is a query, a column a key.
//
// A weight is 2^(score c + offset), and where a row is divided by the sum of its weights in the
// end, its offset hardly matters: what it is for is to keep that sum within reach of fp32. So it is
// 0 unless a sum comes out large or small, and only then is the maximum of the row looked for.
#pragma once

#include "attention_softmax.h"
#include "tile_attention_pack.h"

namespace sbert_fast::cpu::SBF_ISA {

// A sum that is larger, or smaller than its inverse, is computed again with an offset.
constexpr float kLargestSum = 1099511627776.0f;  // 2^40

// 2^x: at most 1e-4 of it wrong, which is little to bf16. Exactly 0 for x = -inf; NaN stays.
SBF_INLINE VecF exp2_rough(VecF x) {
  const VecF f = fraction(x);
  VecF p = VecF::set1(7.82679700e-2f);
  p = fused(p, f, VecF::set1(2.26307683e-1f));
  p = fused(p, f, VecF::set1(6.95424347e-1f));
  p = fused(p, f, VecF::set1(1.0f));
  return scale_by_floor(p, x);
}

// Scores of 16 queries and 32 keys, and what turns them into exponents.
struct ScoreStep {
  const float* scores;   // two tiles, the second one for keys from the 17th on
  const float* offsets;  // [query]
  const float* terms;    // null, or what is added to the first score; the row of each next query
                         // begins one to the left
  VecF c;

  template <bool kHasTerms>
  SBF_INLINE VecF exponents(int64_t query, int64_t key) const {
    const float* const tile = scores + key / kTileSide * kTileSlots;
    const VecF score = VecF::load(tile + query * kTileSide + key % kTileSide);
    VecF offset = VecF::set1(offsets[query]);
    if constexpr (kHasTerms) offset = VecF::load(terms - query + key) + offset;
    return fused(score, c, offset);
  }

  // weights[query][32] for queries [from, to); zeros for keys from `kKeys` on.
  template <bool kHasTerms, int64_t kKeys>
  SBF_INLINE void weigh(int64_t from, int64_t to, bf16* weights) const {
    const auto weight = [&](int64_t query, int64_t key) {
      return key < kKeys ? exp2_rough(exponents<kHasTerms>(query, key)) : VecF::zero();
    };
    for (int64_t query = from; query < to; ++query) {
      bf16* const row = weights + query * kStepKeys;
      for (int64_t key = 0; key < kStepKeys; key += 2 * VecF::N) {
        store_rounded<bf16>(row + key, weight(query, key), weight(query, key + VecF::N));
      }
    }
  }

  SBF_INLINE void weigh(int64_t from, int64_t to, int64_t keys, float* weights) const {
    bf16* const rows = reinterpret_cast<bf16*>(weights);
    if (keys > kTileSide) {
      terms == nullptr ? weigh<false, kStepKeys>(from, to, rows)
                       : weigh<true, kStepKeys>(from, to, rows);
    } else {
      terms == nullptr ? weigh<false, kTileSide>(from, to, rows)
                       : weigh<true, kTileSide>(from, to, rows);
    }
  }

  // Raises tops[query][16] to the largest exponents, offsets not counted.
  SBF_INLINE void raise(int64_t queries, int64_t keys, float* tops) const {
    for (int64_t query = 0; query < queries; ++query) {
      for (int64_t key = 0; key < keys; key += VecF::N) {
        float* const to = tops + query * kTileSide + key % kTileSide;
        const VecF x =
            terms == nullptr ? exponents<false>(query, key) : exponents<true>(query, key);
        const int there = static_cast<int>(smaller(VecF::N, keys - key));
        max(blend_first(there, x, VecF::set1(kLowest)), VecF::load(to)).store(to);
      }
    }
  }
};

// Whether each of the first `count` sums is neither too large nor too small; NaN is neither.
SBF_INLINE bool are_within_reach(const float* sums, const float* inverses, int64_t count) {
  VecF beyond = VecF::zero();
  for (int64_t i = 0; i < count; i += VecF::N) {
    const VecF extreme = max(VecF::load(sums + i), VecF::load(inverses + i));
    const VecF wrong = select_lt(VecF::set1(kLargestSum), extreme, VecF::set1(1.0f), VecF::zero());
    const int there = static_cast<int>(smaller(VecF::N, count - i));
    beyond = max(beyond, blend_first(there, wrong, VecF::zero()));
  }
  return reduce_max(beyond) == 0.0f;
}

}  // namespace sbert_fast::cpu::SBF_ISA
