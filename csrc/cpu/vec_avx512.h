// VecF on AVX-512 (F, BW, DQ, VL). Included by vec.h, which says what each function promises.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace sbert_fast::cpu::SBF_ISA {

struct VecF {
  static constexpr int N = 16;
  __m512 v;

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static SBF_INLINE VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static SBF_INLINE VecF load_partial(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(first(n), p)};
  }
  static SBF_INLINE VecF set1(float x) { return {_mm512_set1_ps(x)}; }
  static SBF_INLINE VecF zero() { return {_mm512_setzero_ps()}; }
  SBF_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  SBF_INLINE void store_partial(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
};

SBF_INLINE VecF operator+(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
SBF_INLINE VecF operator-(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
SBF_INLINE VecF operator*(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
SBF_INLINE VecF operator/(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
SBF_INLINE VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
SBF_INLINE VecF max(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }
SBF_INLINE VecF min(VecF a, VecF b) { return {_mm512_min_ps(a.v, b.v)}; }
SBF_INLINE VecF sqrt(VecF a) { return {_mm512_sqrt_ps(a.v)}; }
SBF_INLINE VecF abs(VecF a) { return {_mm512_abs_ps(a.v)}; }

SBF_INLINE VecF select_lt(VecF a, VecF b, VecF x, VecF y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}

SBF_INLINE VecF blend_first(int n, VecF a, VecF b) {
  return {_mm512_mask_blend_ps(VecF::first(n), b.v, a.v)};
}

SBF_INLINE VecF copysign(VecF magnitude, VecF sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, magnitude.v), _mm512_and_ps(bit, sign.v))};
}

SBF_INLINE VecF add_exponent(VecF a, VecF t) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(t.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), n))};
}

SBF_INLINE VecF scale_by_power(VecF a, VecF t) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(t.v), 23);
  const __m512i power = _mm512_add_epi32(n, _mm512_set1_epi32(0x3f800000));
  return {_mm512_mul_ps(a.v, _mm512_castsi512_ps(power))};
}

SBF_INLINE VecF lookup(const float (&table)[kLookupSize], VecF t) {
  const __m512i at = _mm512_castps_si512(t.v);
  return {_mm512_permutex2var_ps(_mm512_load_ps(table), at, _mm512_load_ps(table + 16))};
}
SBF_INLINE VecF fraction(VecF a) {
  return {_mm512_reduce_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
SBF_INLINE VecF scale_by_floor(VecF a, VecF b) { return {_mm512_scalef_ps(a.v, b.v)}; }
SBF_INLINE VecF fused(VecF a, VecF b, VecF c) { return fma(a, b, c); }

// Rows i, i + 4, i + 8 and i + 12, four columns each.
SBF_INLINE __m512 load_every_fourth(const float* row, int64_t step) {
  __m512 r = _mm512_castps128_ps512(_mm_loadu_ps(row));
  r = _mm512_insertf32x4(r, _mm_loadu_ps(row + step), 1);
  r = _mm512_insertf32x4(r, _mm_loadu_ps(row + 2 * step), 2);
  return _mm512_insertf32x4(r, _mm_loadu_ps(row + 3 * step), 3);
}
SBF_INLINE void transpose4(const float* rows, int64_t ld, float* columns, int64_t ld_columns) {
  const __m512 r0 = load_every_fourth(rows, 4 * ld);
  const __m512 r1 = load_every_fourth(rows + ld, 4 * ld);
  const __m512 r2 = load_every_fourth(rows + 2 * ld, 4 * ld);
  const __m512 r3 = load_every_fourth(rows + 3 * ld, 4 * ld);
  const __m512 a = _mm512_unpacklo_ps(r0, r1), b = _mm512_unpackhi_ps(r0, r1);
  const __m512 c = _mm512_unpacklo_ps(r2, r3), d = _mm512_unpackhi_ps(r2, r3);
  _mm512_storeu_ps(columns, _mm512_shuffle_ps(a, c, 0x44));
  _mm512_storeu_ps(columns + ld_columns, _mm512_shuffle_ps(a, c, 0xee));
  _mm512_storeu_ps(columns + 2 * ld_columns, _mm512_shuffle_ps(b, d, 0x44));
  _mm512_storeu_ps(columns + 3 * ld_columns, _mm512_shuffle_ps(b, d, 0xee));
}

SBF_INLINE float reduce_add(VecF a) {
  const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
SBF_INLINE float reduce_max(VecF a) {
  const __m256 b = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}

SBF_INLINE void store_low_bytes(uint8_t* p, VecF a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_castps_si512(a.v)));
}
SBF_INLINE VecF from_integers(VecF a) { return {_mm512_cvtepi32_ps(_mm512_castps_si512(a.v))}; }
SBF_INLINE VecF dot_bytes(VecF a, VecF b, VecF c) {
  const __m512i x = _mm512_castps_si512(a.v), w = _mm512_castps_si512(b.v);
  const __m512i sum = _mm512_castps_si512(c.v);
#if defined(__AVX512VNNI__)
  return {_mm512_castsi512_ps(_mm512_dpbusd_epi32(sum, x, w))};
#else
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(x, _mm512_set1_epi16(0xff)),
                                         _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(x, 8), _mm512_srai_epi16(w, 8));
  return {_mm512_castsi512_ps(_mm512_add_epi32(sum, _mm512_add_epi32(even, odd)))};
#endif
}

typedef uint64_t VecW __attribute__((vector_size(64)));
SBF_INLINE VecW multiply_words(VecW a, uint32_t b) {
  // Of all lanes: GCC 12 warns of what the form without a mask leaves undefined.
  return (VecW)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
}

SBF_INLINE VecF widen(__m256i b) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16))};
}
SBF_INLINE __m256i narrow(VecF a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i top = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, top, _mm512_set1_epi32(0x40)));
}
SBF_INLINE VecF load_bf16(const bf16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SBF_INLINE VecF load_bf16_partial(const bf16* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(VecF::first(n), p));
}
SBF_INLINE void store_bf16(bf16* p, VecF a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a));
}
SBF_INLINE void store_bf16_partial(bf16* p, VecF a, int n) {
  _mm256_mask_storeu_epi16(p, VecF::first(n), narrow(a));
}

// Pairs: a VecF whose lanes each hold two bf16, the first one in the low half.
SBF_INLINE VecF first_of_pairs(VecF a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 16))};
}
SBF_INLINE VecF second_of_pairs(VecF a) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), upper))};
}

#if defined(__AVX512BF16__)
// c + the sum of both products of each pair. Subnormal inputs and results count as zero.
SBF_INLINE VecF dot_pairs(VecF a, VecF b, VecF c) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}
// Subnormals become zero.
SBF_INLINE void store_bf16_flushed(bf16* p, VecF a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
}
SBF_INLINE void store_bf16_flushed(bf16* p, VecF first, VecF second) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v));
}
// The first n of 2 N consecutive elements as pairs, then zeros.
SBF_INLINE VecF load_pairs(const bf16* p, int n) {
  const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << n) - 1u);
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p))};
}
// (a[i], b[i]) of bf16 values that were widened.
SBF_INLINE VecF interleave_pairs(VecF a, VecF b) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(a.v), 16);
  return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(b.v)))};
}
// (a[i], b[i]) rounded to nearest even; neither is subnormal.
SBF_INLINE VecF round_pairs(VecF a, VecF b) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);  // all of a, then all of b
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves))};
}
SBF_INLINE void zip_rows(const bf16* first, const bf16* second, float* left, float* right) {
  const __m512i a = _mm512_loadu_si512(first);
  const __m512i b = second == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(second);
  _mm512_storeu_si512(left, _mm512_unpacklo_epi16(a, b));
  _mm512_storeu_si512(right, _mm512_unpackhi_epi16(a, b));
}
SBF_INLINE void store_unzipped(bf16* p, const float* left, const float* right, VecF factor) {
  const __m512 a = _mm512_mul_ps(_mm512_loadu_ps(left), factor.v);
  const __m512 b = _mm512_mul_ps(_mm512_loadu_ps(right), factor.v);
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(b, a);
  const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi64(order, halves));
}
#endif

}  // namespace sbert_fast::cpu::SBF_ISA
