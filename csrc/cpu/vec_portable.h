// VecF as two 16-byte vectors of the compiler: native to SSE and NEON. Included by vec.h, which
// says what each function promises.
#pragma once

#include <stdint.h>

#if defined(__ARM_NEON)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <immintrin.h>
#endif

namespace sbert_fast::cpu::SBF_ISA {

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef float UnalignedFloat4 __attribute__((vector_size(16), aligned(4), may_alias));

SBF_INLINE Float4 load4(const void* p) { return *static_cast<const UnalignedFloat4*>(p); }
SBF_INLINE void store4(void* p, Float4 a) { *static_cast<UnalignedFloat4*>(p) = a; }

struct VecF {
  static constexpr int N = 8;
  Float4 lo, hi;

  static SBF_INLINE VecF load(const float* p) { return {load4(p), load4(p + 4)}; }
  static SBF_INLINE VecF load_partial(const float* p, int n) {
    float lanes[N] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  static SBF_INLINE VecF set1(float x) { return {Float4{x, x, x, x}, Float4{x, x, x, x}}; }
  static SBF_INLINE VecF zero() { return set1(0.0f); }
  SBF_INLINE void store(float* p) const {
    store4(p, lo);
    store4(p + 4, hi);
  }
  SBF_INLINE void store_partial(float* p, int n) const {
    float lanes[N];
    store(lanes);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }
};

SBF_INLINE Float4 fma(Float4 a, Float4 b, Float4 c) {
#if defined(__ARM_NEON)
  return (Float4)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
SBF_INLINE Int4 bits(Float4 a) { return (Int4)a; }

SBF_INLINE VecF operator+(VecF a, VecF b) { return {a.lo + b.lo, a.hi + b.hi}; }
SBF_INLINE VecF operator-(VecF a, VecF b) { return {a.lo - b.lo, a.hi - b.hi}; }
SBF_INLINE VecF operator*(VecF a, VecF b) { return {a.lo * b.lo, a.hi * b.hi}; }
SBF_INLINE VecF operator/(VecF a, VecF b) { return {a.lo / b.lo, a.hi / b.hi}; }
SBF_INLINE VecF fma(VecF a, VecF b, VecF c) {
  return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)};
}
SBF_INLINE VecF max(VecF a, VecF b) {
  return {a.lo > b.lo ? a.lo : b.lo, a.hi > b.hi ? a.hi : b.hi};
}
SBF_INLINE VecF min(VecF a, VecF b) {
  return {a.lo < b.lo ? a.lo : b.lo, a.hi < b.hi ? a.hi : b.hi};
}
SBF_INLINE VecF sqrt(VecF a) {
  for (int i = 0; i < 4; ++i) {
    a.lo[i] = __builtin_sqrtf(a.lo[i]);
    a.hi[i] = __builtin_sqrtf(a.hi[i]);
  }
  return a;
}
SBF_INLINE VecF abs(VecF a) {
  return {(Float4)(bits(a.lo) & 0x7fffffff), (Float4)(bits(a.hi) & 0x7fffffff)};
}
SBF_INLINE VecF select_lt(VecF a, VecF b, VecF x, VecF y) {
  return {a.lo < b.lo ? x.lo : y.lo, a.hi < b.hi ? x.hi : y.hi};
}
SBF_INLINE VecF blend_first(int n, VecF a, VecF b) {
  const Int4 lane = {0, 1, 2, 3};
  return {lane < n ? a.lo : b.lo, lane < n - 4 ? a.hi : b.hi};
}
SBF_INLINE VecF copysign(VecF m, VecF sign) {
  const Int4 bit = Int4{} + INT32_MIN;
  return {(Float4)((bits(m.lo) & ~bit) | (bits(sign.lo) & bit)),
          (Float4)((bits(m.hi) & ~bit) | (bits(sign.hi) & bit))};
}
SBF_INLINE VecF add_exponent(VecF a, VecF t) {
  return {(Float4)(bits(a.lo) + (bits(t.lo) << 23)), (Float4)(bits(a.hi) + (bits(t.hi) << 23))};
}

SBF_INLINE VecF scale_by_power(VecF a, VecF t) {
  return {a.lo * (Float4)((bits(t.lo) << 23) + 0x3f800000),
          a.hi * (Float4)((bits(t.hi) << 23) + 0x3f800000)};
}

SBF_INLINE VecF lookup(const float (&table)[kLookupSize], VecF t) {
  float lanes[VecF::N];
  t.store(lanes);
  for (float& lane : lanes) {
    int32_t at;
    __builtin_memcpy(&at, &lane, sizeof(at));
    lane = table[at & (kLookupSize - 1)];
  }
  return VecF::load(lanes);
}

SBF_INLINE VecF fused(VecF a, VecF b, VecF c) {
  VecF sum = VecF::zero();
  for (int i = 0; i < 4; ++i) {
    sum.lo[i] = __builtin_fmaf(a.lo[i], b.lo[i], c.lo[i]);
    sum.hi[i] = __builtin_fmaf(a.hi[i], b.hi[i], c.hi[i]);
  }
  return sum;
}

// The exponents of all powers that are wanted, and some beyond them; NaN stays.
SBF_INLINE VecF clamp_exponent(VecF a) {
  return min(VecF::set1(1000.0f), max(VecF::set1(-1000.0f), a));
}
SBF_INLINE VecF floor_exponent(VecF a) {
  const VecF magic = VecF::set1(12582912.0f);  // 1.5 * 2^23
  const VecF near = (a + magic) - magic;
  return select_lt(a, near, near - VecF::set1(1.0f), near);
}
SBF_INLINE VecF fraction(VecF a) {
  const VecF exponent = clamp_exponent(a), n = floor_exponent(exponent);
  const VecF f = exponent - n;
  return select_lt(exponent, f + n, f - VecF::set1(5.96046448e-8f), f);
}
SBF_INLINE VecF scale_by_floor(VecF a, VecF b) {
  const VecF n = floor_exponent(clamp_exponent(b));
  const VecF within = min(VecF::set1(127.0f), max(VecF::set1(-126.0f), n));
  const VecF scaled = scale_by_power(a, within + VecF::set1(12582912.0f));
  const VecF large = select_lt(VecF::set1(127.0f), n, a * VecF::set1(__builtin_inff()), scaled);
  return select_lt(n, VecF::set1(-126.0f), VecF::zero(), large);
}

SBF_INLINE void transpose4(const float* rows, int64_t ld, float* columns, int64_t ld_columns) {
  for (int half = 0; half < 2; ++half) {
    Float4 r[4];
    for (int i = 0; i < 4; ++i) r[i] = load4(rows + (4 * half + i) * ld);
    const Float4 a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
    const Float4 b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
    const Float4 c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
    const Float4 d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    const Float4 out[4] = {
        __builtin_shufflevector(a, c, 0, 1, 4, 5), __builtin_shufflevector(a, c, 2, 3, 6, 7),
        __builtin_shufflevector(b, d, 0, 1, 4, 5), __builtin_shufflevector(b, d, 2, 3, 6, 7)};
    for (int i = 0; i < 4; ++i) store4(columns + i * ld_columns + 4 * half, out[i]);
  }
}

SBF_INLINE float reduce_add(VecF a) {
  const Float4 c = a.lo + a.hi;
  return (c[0] + c[2]) + (c[1] + c[3]);
}
SBF_INLINE float reduce_max(VecF a) {
  const Float4 c = max(a, VecF{a.hi, a.lo}).lo;
  const float even = c[0] > c[2] ? c[0] : c[2];
  const float odd = c[1] > c[3] ? c[1] : c[3];
  return even > odd ? even : odd;
}

SBF_INLINE void store_low_bytes(uint8_t* p, VecF a) {
  for (int i = 0; i < 4; ++i) {
    p[i] = static_cast<uint8_t>(bits(a.lo)[i]);
    p[i + 4] = static_cast<uint8_t>(bits(a.hi)[i]);
  }
}
SBF_INLINE VecF from_integers(VecF a) {
  return {__builtin_convertvector(bits(a.lo), Float4), __builtin_convertvector(bits(a.hi), Float4)};
}
SBF_INLINE Float4 dot_bytes(Float4 a, Float4 b, Float4 c) {
  Int4 sum = bits(c);
  for (int shift = 0; shift < 32; shift += 8) {
    sum += ((bits(a) >> shift) & 0xff) * (bits(b) << (24 - shift) >> 24);
  }
  return (Float4)sum;
}
SBF_INLINE VecF dot_bytes(VecF a, VecF b, VecF c) {
  return {dot_bytes(a.lo, b.lo, c.lo), dot_bytes(a.hi, b.hi, c.hi)};
}

typedef uint64_t VecW __attribute__((vector_size(16)));
SBF_INLINE VecW multiply_words(VecW a, uint32_t b) {
#if defined(__SSE2__)
  return (VecW)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * b;
#endif
}

SBF_INLINE VecF load_bf16(const bf16* p) {
  uint32_t lanes[VecF::N];
  for (int i = 0; i < VecF::N; ++i) lanes[i] = static_cast<uint32_t>(p[i].bits) << 16;
  return {load4(lanes), load4(lanes + 4)};
}
SBF_INLINE void store_bf16(bf16* p, VecF a) {
  uint32_t lanes[VecF::N];
  store4(lanes, a.lo);
  store4(lanes + 4, a.hi);
  for (int i = 0; i < VecF::N; ++i) {
    const uint32_t top = lanes[i] >> 16;
    const bool nan = (lanes[i] & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = (lanes[i] + 0x7fffu + (top & 1u)) >> 16;
    p[i].bits = static_cast<uint16_t>(nan ? top | 0x40u : rounded);
  }
}

SBF_INLINE VecF first_of_pairs(VecF a) {
  return {(Float4)(bits(a.lo) << 16), (Float4)(bits(a.hi) << 16)};
}
SBF_INLINE VecF second_of_pairs(VecF a) {
  const Int4 upper = Int4{} + static_cast<int32_t>(0xffff0000u);
  return {(Float4)(bits(a.lo) & upper), (Float4)(bits(a.hi) & upper)};
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

SBF_INLINE void zip_rows(const bf16* first, const bf16* second, float* left, float* right) {
  for (int i = 0; i < 32; ++i) {
    const uint32_t upper = second == nullptr ? 0 : second[i].bits;
    const uint32_t pair = upper << 16 | first[i].bits;
    float* const row = i / 4 % 2 == 0 ? left : right;
    __builtin_memcpy(row + i / 8 * 4 + i % 4, &pair, sizeof(pair));
  }
}
SBF_INLINE void store_unzipped(bf16* p, const float* left, const float* right, VecF factor) {
  float lanes[32];
  for (int i = 0; i < 32; ++i) lanes[i] = (i / 4 % 2 == 0 ? left : right)[i / 8 * 4 + i % 4];
  for (int i = 0; i < 32; i += VecF::N) store_bf16(p + i, VecF::load(lanes + i) * factor);
}

}  // namespace sbert_fast::cpu::SBF_ISA
