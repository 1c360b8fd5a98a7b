// VecF on AVX2 with FMA. Included by vec.h, which says what each function promises.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace sbert_fast::cpu::SBF_ISA {

struct VecF {
  static constexpr int N = 8;
  __m256 v;

  static SBF_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static SBF_INLINE VecF load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static SBF_INLINE VecF load_partial(const float* p, int n) {
    return {_mm256_maskload_ps(p, first(n))};
  }
  static SBF_INLINE VecF set1(float x) { return {_mm256_set1_ps(x)}; }
  static SBF_INLINE VecF zero() { return {_mm256_setzero_ps()}; }
  SBF_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  SBF_INLINE void store_partial(float* p, int n) const { _mm256_maskstore_ps(p, first(n), v); }
};

SBF_INLINE VecF operator+(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
SBF_INLINE VecF operator-(VecF a, VecF b) { return {_mm256_sub_ps(a.v, b.v)}; }
SBF_INLINE VecF operator*(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
SBF_INLINE VecF operator/(VecF a, VecF b) { return {_mm256_div_ps(a.v, b.v)}; }
SBF_INLINE VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
SBF_INLINE VecF max(VecF a, VecF b) { return {_mm256_max_ps(a.v, b.v)}; }
SBF_INLINE VecF min(VecF a, VecF b) { return {_mm256_min_ps(a.v, b.v)}; }
SBF_INLINE VecF sqrt(VecF a) { return {_mm256_sqrt_ps(a.v)}; }
SBF_INLINE VecF abs(VecF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }

SBF_INLINE VecF select_lt(VecF a, VecF b, VecF x, VecF y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
SBF_INLINE VecF blend_first(int n, VecF a, VecF b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(VecF::first(n)))};
}
SBF_INLINE VecF copysign(VecF magnitude, VecF sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, magnitude.v), _mm256_and_ps(bit, sign.v))};
}
SBF_INLINE VecF add_exponent(VecF a, VecF t) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(t.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), n))};
}

SBF_INLINE VecF scale_by_power(VecF a, VecF t) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(t.v), 23);
  const __m256i power = _mm256_add_epi32(n, _mm256_set1_epi32(0x3f800000));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(power))};
}

// Rows i and i + 4, four columns each.
SBF_INLINE __m256 load_every_fourth(const float* row, int64_t step) {
  const __m256 r = _mm256_castps128_ps256(_mm_loadu_ps(row));
  return _mm256_insertf128_ps(r, _mm_loadu_ps(row + step), 1);
}
SBF_INLINE void transpose4(const float* rows, int64_t ld, float* columns, int64_t ld_columns) {
  const __m256 r0 = load_every_fourth(rows, 4 * ld);
  const __m256 r1 = load_every_fourth(rows + ld, 4 * ld);
  const __m256 r2 = load_every_fourth(rows + 2 * ld, 4 * ld);
  const __m256 r3 = load_every_fourth(rows + 3 * ld, 4 * ld);
  const __m256 a = _mm256_unpacklo_ps(r0, r1), b = _mm256_unpackhi_ps(r0, r1);
  const __m256 c = _mm256_unpacklo_ps(r2, r3), d = _mm256_unpackhi_ps(r2, r3);
  _mm256_storeu_ps(columns, _mm256_shuffle_ps(a, c, 0x44));
  _mm256_storeu_ps(columns + ld_columns, _mm256_shuffle_ps(a, c, 0xee));
  _mm256_storeu_ps(columns + 2 * ld_columns, _mm256_shuffle_ps(b, d, 0x44));
  _mm256_storeu_ps(columns + 3 * ld_columns, _mm256_shuffle_ps(b, d, 0xee));
}

SBF_INLINE float reduce_add(VecF a) {
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
SBF_INLINE float reduce_max(VecF a) {
  const __m128 c = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 d = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}

SBF_INLINE VecF fused(VecF a, VecF b, VecF c) { return fma(a, b, c); }
SBF_INLINE void store_low_bytes(uint8_t* p, VecF a) {
  const __m256i low = _mm256_and_si256(_mm256_castps_si256(a.v), _mm256_set1_epi32(0xff));
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
SBF_INLINE VecF from_integers(VecF a) { return {_mm256_cvtepi32_ps(_mm256_castps_si256(a.v))}; }
SBF_INLINE VecF dot_bytes(VecF a, VecF b, VecF c) {
  const __m256i x = _mm256_castps_si256(a.v), w = _mm256_castps_si256(b.v);
  const __m256i sum = _mm256_castps_si256(c.v);
#if defined(__AVXVNNI__)
  return {_mm256_castsi256_ps(_mm256_dpbusd_avx_epi32(sum, x, w))};
#else
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0xff)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(w, 8));
  return {_mm256_castsi256_ps(_mm256_add_epi32(sum, _mm256_add_epi32(even, odd)))};
#endif
}

typedef uint64_t VecW __attribute__((vector_size(32)));
SBF_INLINE VecW multiply_words(VecW a, uint32_t b) {
  return (VecW)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
}

SBF_INLINE VecF widen(__m128i b) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16))};
}
SBF_INLINE __m128i narrow(VecF a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i top = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i lanes = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
}
SBF_INLINE VecF load_bf16(const bf16* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SBF_INLINE void store_bf16(bf16* p, VecF a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a));
}

SBF_INLINE VecF first_of_pairs(VecF a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 16))};
}
SBF_INLINE VecF second_of_pairs(VecF a) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(a.v), upper))};
}

SBF_INLINE VecF load_bf16_partial(const bf16* p, int n) {
  bf16 lanes[VecF::N] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load_bf16(lanes);
}
SBF_INLINE void store_bf16_partial(bf16* p, VecF a, int n) {
  bf16 lanes[VecF::N];
  store_bf16(lanes, a);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

}  // namespace sbert_fast::cpu::SBF_ISA
