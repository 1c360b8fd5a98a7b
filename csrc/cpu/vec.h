// One fp32 vector type per instruction set, and the few functions the kernels are written in.
//
// Every translation unit sees its own copy in namespace sbert_fast::cpu::SBF_ISA, so that the
// linker can never merge code compiled for different instruction sets. For the same reason neither
// this header nor one that includes it may instantiate a template or inline function of the
// standard library.
//
//   VecF::load, store and their _partial forms need no alignment. A _partial form touches exactly
//     n elements, 0 <= n <= N, and loads zeros into the other lanes.
//   max(a, b), min(a, b): b where either is NaN.
//   select_lt(a, b, x, y): x where a < b, else (also where either is NaN) y.
//   blend_first(n, a, b): lanes [0, n) of a, the others of b; 0 <= n <= N.
//   copysign(a, b): |a| with the sign of b.
//   add_exponent(a, t): a * 2^n, n being the integer in the low bits of t, by adding to the
//     exponent of a; the result must be normal, and NaN is lost.
//   scale_by_power(a, t): the same by a product; 2^n must be normal, and NaN stays.
//   lookup(table, t): the element of an aligned table for the low bits of each lane of t; not on
//     AVX2.
//   fused(a, b, c): a * b + c, rounded once on every CPU.
//   store_low_bytes(p, a): the lowest byte of each lane.
//   from_integers(a): lanes that hold an int32 as floats.
//   dot_bytes(a, b, c): of int32 lanes, c + the sum of four products: unsigned bytes of a, signed
//     ones of b.
//   VecW: a vector of 64-bit integers, with the operators that the compiler gives it;
//     multiply_words(a, b): the products of their low halves with b.
//   Only on the instruction sets that have tiles:
//     fraction(a): a - floor(a), rounded down, where |a| < 2^22; elsewhere in [0, 1]; NaN stays.
//     scale_by_floor(a, b): a * 2^floor(b) for a in [1, 2]; below 2^-126 it may be zero; NaN in b
//       gives anything.
//     zip_rows(first, second, left, right): pairs of elements of two rows of 32, the first in the
//       low half; each second group of four pairs goes to `right`. No second row is one of zeros.
//     store_unzipped(p, left, right, factor): 32 products in the order that zip_rows took apart.
//   transpose4(rows, ld, columns, ld_columns): N rows of 4 elements to 4 rows of N elements.
//   reduce_add, reduce_max: the upper half onto the lower half until one lane is left.
//   bf16 stores round to nearest even, keep subnormals, and keep NaN. (The hardware conversion
//     flushes subnormals, and what it would save is hidden behind memory.)
//   first_of_pairs, second_of_pairs: of lanes that hold two bf16, the first one in the low half.
//   load_as<T>, store_as<T>: T = float or bf16.
#pragma once

#include <stdint.h>

#ifndef SBF_ISA
#error "define SBF_ISA (generic, avx2, avx512, ...) before the kernel headers"
#endif

#define SBF_INLINE inline __attribute__((always_inline))

namespace sbert_fast::cpu::SBF_ISA {

struct bf16 {
  uint16_t bits;
};

constexpr int kLookupSize = 32;  // of a table

}  // namespace sbert_fast::cpu::SBF_ISA

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif

namespace sbert_fast::cpu::SBF_ISA {

// At most 2 ulp. Exactly 0 below -87.33, so that nothing is subnormal; inf above 88.72; NaN stays.
SBF_INLINE VecF exp(VecF x) {
  // Adding 1.5 * 2^23 rounds x / ln 2 to an integer n and leaves n in the low bits.
  const VecF magic = VecF::set1(12582912.0f);
  const VecF t = fma(x, VecF::set1(1.44269504f), magic);
  const VecF n = t - magic;
  VecF r = fma(n, VecF::set1(-0.693359375f), x);
  r = fma(n, VecF::set1(2.12194440e-4f), r);

  // e^r for |r| <= ln(2) / 2.
  VecF q = VecF::set1(1.38145965e-3f);
  q = fma(q, r, VecF::set1(8.36871751e-3f));
  q = fma(q, r, VecF::set1(4.16683890e-2f));
  q = fma(q, r, VecF::set1(1.66665211e-1f));
  q = fma(q, r, VecF::set1(0.49999994f));
  q = fma(q, r, VecF::set1(1.0f));
  q = fma(q, r, VecF::set1(1.0f));
  const VecF y = add_exponent(q, t);

  const VecF over = x * VecF::set1(3.4e38f);
  const VecF finite = select_lt(x, VecF::set1(-87.33f), VecF::zero(), y);
  return select_lt(x, VecF::set1(88.7228394f), finite, over);
}

// At most 2 ulp; NaN stays.
SBF_INLINE VecF erf(VecF x) {
  const VecF a = abs(x);
  const VecF s = x * x;
  // erf(x) = x + x p(x^2) near zero.
  VecF p = VecF::set1(-5.88677358e-4f);
  p = fma(p, s, VecF::set1(4.97311680e-3f));
  p = fma(p, s, VecF::set1(-2.67533343e-2f));
  p = fma(p, s, VecF::set1(1.12814665e-1f));
  p = fma(p, s, VecF::set1(-3.76124620e-1f));
  p = fma(p, s, VecF::set1(1.28379151e-1f));
  const VecF inner = fma(p, x, x);

  // erf(a) = 1 - e^g(a) elsewhere; beyond 3.95 it rounds to 1.
  const VecF u = min(VecF::set1(3.95f), a);
  VecF g = VecF::set1(1.92426043e-4f);
  g = fma(g, u, VecF::set1(-3.00853699e-3f));
  g = fma(g, u, VecF::set1(2.20876411e-2f));
  g = fma(g, u, VecF::set1(-1.03640325e-1f));
  g = fma(g, u, VecF::set1(-6.37517035e-1f));
  g = fma(g, u, VecF::set1(-1.12747502f));
  g = fma(g, u, VecF::set1(-2.44713912e-4f));
  const VecF outer = copysign(VecF::set1(1.0f) - exp(g), x);
  return select_lt(a, VecF::set1(0.95f), inner, outer);
}

// The larger one; NaN where either is NaN.
SBF_INLINE VecF max_nan(VecF a, VecF b) {
#if defined(__AVX512F__)
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q);
  return {_mm512_mask_add_ps(_mm512_max_ps(a.v, b.v), nan, a.v, b.v)};
#elif defined(__AVX2__)
  const __m256 nan = _mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q);
  return {_mm256_blendv_ps(_mm256_max_ps(a.v, b.v), _mm256_add_ps(a.v, b.v), nan)};
#else
  return {((a.lo > b.lo) | (a.lo != a.lo)) ? a.lo : b.lo,
          ((a.hi > b.hi) | (a.hi != a.hi)) ? a.hi : b.hi};
#endif
}

template <class T>
SBF_INLINE VecF load_as(const T* p) {
  if constexpr (sizeof(T) == sizeof(bf16)) {
    return load_bf16(p);
  } else {
    return VecF::load(p);
  }
}

template <class T>
SBF_INLINE VecF load_as_partial(const T* p, int n) {
  if constexpr (sizeof(T) == sizeof(bf16)) {
    return load_bf16_partial(p, n);
  } else {
    return VecF::load_partial(p, n);
  }
}

template <class T>
SBF_INLINE void store_as(T* p, VecF a) {
  if constexpr (sizeof(T) == sizeof(bf16)) {
    store_bf16(p, a);
  } else {
    a.store(p);
  }
}

// As store_as; bf16 subnormals may become zero, where the CPU rounds by itself.
template <class T>
SBF_INLINE void store_rounded(T* p, VecF a) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == sizeof(bf16)) return store_bf16_flushed(p, a);
#endif
  store_as<T>(p, a);
}

template <class T>
SBF_INLINE void store_rounded(T* p, VecF first, VecF second) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == sizeof(bf16)) return store_bf16_flushed(p, first, second);
#endif
  store_rounded<T>(p, first);
  store_rounded<T>(p + VecF::N, second);
}

template <class T>
SBF_INLINE void store_as_partial(T* p, VecF a, int n) {
  if constexpr (sizeof(T) == sizeof(bf16)) {
    store_bf16_partial(p, a, n);
  } else {
    a.store_partial(p, n);
  }
}

}  // namespace sbert_fast::cpu::SBF_ISA
