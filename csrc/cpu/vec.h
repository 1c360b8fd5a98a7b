// One fp32 vector type per instruction set, and the few functions the kernels are written in.
//
// Every translation unit sees its own copy in namespace sbert_fast::cpu::SBF_ISA, so that the linker
// can never merge code compiled for different instruction sets. For the same reason neither this
// header nor one that includes it may instantiate a template or inline function of the standard
// library.
//
//   VecF::load, store and their _partial forms need no alignment. A _partial form touches exactly n
//     elements, 0 <= n <= N, and loads zeros into the other lanes.
//   max(a, b), min(a, b): b where either is NaN.
//   select_lt(a, b, x, y): x where a < b, else (also where either is NaN) y.
//   blend_first(n, a, b): lanes [0, n) of a, the others of b; 0 <= n <= N.
//   copysign(a, b): |a| with the sign of b.
//   add_exponent(a, t): a * 2^n, n being the integer in the low bits of t; the result must be normal.
//   reduce_add, reduce_max: the upper half onto the lower half until one lane is left.
//   bf16 stores round to nearest even, keep subnormals, and keep NaN. (The hardware conversion flushes
//     subnormals, and what it would save is hidden behind memory.)
//   load_as<T>, store_as<T>: T = float or bf16.
#pragma once

#include <stdint.h>

#ifndef SBF_ISA
#error "define SBF_ISA (generic, avx2, avx512 or avx512_bf16) before the kernel headers"
#endif

#define SBF_INLINE inline __attribute__((always_inline))

namespace sbert_fast::cpu::SBF_ISA {

struct bf16 {
  uint16_t bits;
};

}  // namespace sbert_fast::cpu::SBF_ISA

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif

namespace sbert_fast::cpu::SBF_ISA {

// At most 2 ulp. Exactly 0 below -87.33, so that no subnormal is produced; inf above 88.72; NaN stays.
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

template <typename T>
VecF load_as(const T* p);
template <typename T>
VecF load_as_partial(const T* p, int n);
template <typename T>
void store_as(T* p, VecF a);
template <typename T>
void store_as_partial(T* p, VecF a, int n);

template <>
SBF_INLINE VecF load_as<float>(const float* p) { return VecF::load(p); }
template <>
SBF_INLINE VecF load_as_partial<float>(const float* p, int n) { return VecF::load_partial(p, n); }
template <>
SBF_INLINE void store_as<float>(float* p, VecF a) { a.store(p); }
template <>
SBF_INLINE void store_as_partial<float>(float* p, VecF a, int n) { a.store_partial(p, n); }

template <>
SBF_INLINE VecF load_as<bf16>(const bf16* p) { return load_bf16(p); }
template <>
SBF_INLINE VecF load_as_partial<bf16>(const bf16* p, int n) { return load_bf16_partial(p, n); }
template <>
SBF_INLINE void store_as<bf16>(bf16* p, VecF a) { store_bf16(p, a); }
template <>
SBF_INLINE void store_as_partial<bf16>(bf16* p, VecF a, int n) { store_bf16_partial(p, a, n); }

}  // namespace sbert_fast::cpu::SBF_ISA
