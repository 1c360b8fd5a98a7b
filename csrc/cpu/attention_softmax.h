// Softmax of a tile of scores, one query per lane, keys in order.
#pragma once

#include "attention_tile.h"

namespace sbert_fast::cpu::SBF_ISA {

constexpr float kLowest = -3.402823466e38f;

// 2^(x c) for x c <= 0: at most 2 ulp, exactly 0 below 2^-126, NaN stays.
SBF_INLINE VecF exp2_product(VecF x, VecF c) {
  // Adding 1.5 * 2^23 rounds x c to an integer n and leaves n in the low bits.
  constexpr float kMagic = 12582912.0f;
  const VecF t = fma(x, c, VecF::set1(kMagic));
  const VecF minus_n = VecF::set1(kMagic) - t;
  const VecF f = fma(x, c, minus_n);
  VecF q = VecF::set1(1.53533401e-4f);  // 2^f for |f| <= 1/2
  q = fma(q, f, VecF::set1(1.33989006e-3f));
  q = fma(q, f, VecF::set1(9.61843785e-3f));
  q = fma(q, f, VecF::set1(5.55033237e-2f));
  q = fma(q, f, VecF::set1(0.240226477f));
  q = fma(q, f, VecF::set1(0.693147182f));
  q = fma(q, f, VecF::set1(1.0f));
  return select_lt(t, VecF::set1(kMagic - 126.0f), VecF::zero(), scale_by_power(q, t));
}

// Turns scores[keys][kLanes] into weights[slots][kLanes], in place; two keys may share a slot.
//
// Args:
//   previous, maxima: the maximum of each query before and with these keys.
//   sums: sum of the weights of each query so far, updated.
//   decay: set to what earlier weights, and their products, must be multiplied by.
//   c: the factor that makes scores exponents of 2.
template <class Operand, int VECS>
SBF_INLINE void softmax(float* scores, int64_t keys, const float* previous, const float* maxima,
                        float* sums, float* decay, VecF c) {
  constexpr int N = VecF::N, kPerSlot = Operand::kValuesPerSlot;
  VecF top[VECS], total[VECS];
  for (int v = 0; v < VECS; ++v) {
    top[v] = VecF::load(maxima + v * N);
    total[v] = VecF::zero();
  }
  for (int64_t key = 0; key < keys; key += kPerSlot) {
    for (int v = 0; v < VECS; ++v) {
      const float* row = scores + key * kLanes + v * N;
      const VecF first = exp2_product(VecF::load(row) - top[v], c);
      VecF second = VecF::zero();
      total[v] = total[v] + first;
      if (kPerSlot == 2 && key + 1 < keys) {
        second = exp2_product(VecF::load(row + kLanes) - top[v], c);
        total[v] = total[v] + second;
      }
      Operand::join(first, second).store(scores + key / kPerSlot * kLanes + v * N);
    }
  }
  for (int v = 0; v < VECS; ++v) {
    const VecF fade = exp2_product(VecF::load(previous + v * N) - top[v], c);
    fade.store(decay + v * N);
    fma(VecF::load(sums + v * N), fade, total[v]).store(sums + v * N);
  }
}

// The same for a number of vectors known at run time.
template <class Operand, int VECS = kTileVecs>
SBF_INLINE void softmax_tile(int64_t vecs, float* scores, int64_t keys, const float* previous,
                             const float* maxima, float* sums, float* decay, VecF c) {
  if constexpr (VECS > 1) {
    if (vecs < VECS) {
      return softmax_tile<Operand, VECS - 1>(vecs, scores, keys, previous, maxima, sums, decay, c);
    }
  }
  softmax<Operand, VECS>(scores, keys, previous, maxima, sums, decay, c);
}

}  // namespace sbert_fast::cpu::SBF_ISA
