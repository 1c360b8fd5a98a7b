// Packing of q, k and v: from rows of qkv to the panels that the register tiles read.
//
// A row is read once, whole vectors at a time, and never beyond its D elements. Rotation happens
// here, in fp32.
#pragma once

#include "attention_tile.h"

namespace sbert_fast::cpu::SBF_ISA {

constexpr int64_t kMaxHeadDim = 256;
// Queries and keys per block, so that the panels of a block stay in the cache.
constexpr int64_t kMaxBlock = 128;
constexpr int64_t kPanel = 8192;

SBF_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SBF_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
SBF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SBF_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The rotary tables at the first packed row, or null.
struct Rotary {
  const float* cos;  // [:, D / 2]
  const float* sin;  // [:, D / 2]
};

// RMSNorm of a row of q or k; no weight is no norm.
struct HeadNorm {
  const float* weight;  // [D]
  float eps;
};

// Elements [d, d + N) of a row of D; zeros beyond it.
template <class T>
SBF_INLINE VecF load_dims(const T* row, int64_t d, int64_t D) {
  if (d + VecF::N <= D) return load_as<T>(row + d);
  return d < D ? load_as_partial<T>(row + d, static_cast<int>(D - d)) : VecF::zero();
}

// to[0, D) = (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 being the halves of the row.
template <class T>
SBF_INLINE void rotate_row(const T* row, int64_t D, const float* cos, const float* sin, float* to) {
  const int64_t half = D / 2;
  for (int64_t d = 0; d < half; d += VecF::N) {
    const int n = static_cast<int>(smaller(VecF::N, half - d));
    const VecF x1 = load_dims(row, d, half), x2 = load_dims(row + half, d, half);
    const VecF c = load_dims(cos, d, half), s = load_dims(sin, d, half);
    fma(x1, c, VecF::zero() - x2 * s).store_partial(to + d, n);
    fma(x2, c, x1 * s).store_partial(to + half + d, n);
  }
}

// 1 / sqrt(mean(row^2) + eps).
template <class T>
SBF_INLINE VecF inverse_rms(const T* row, int64_t D, float eps) {
  VecF squares = VecF::zero();
  for (int64_t d = 0; d < D; d += VecF::N) {
    const VecF x = load_dims(row, d, D);
    squares = fma(x, x, squares);
  }
  const float mean = reduce_add(squares) / static_cast<float>(D);
  return VecF::set1(1.0f / __builtin_sqrtf(mean + eps));
}

// to[0, D) = row / sqrt(mean(row^2) + eps) * weight.
template <class T>
SBF_INLINE void norm_row(const T* row, int64_t D, HeadNorm norm, float* to) {
  const VecF factor = inverse_rms(row, D, norm.eps);
  for (int64_t d = 0; d < D; d += VecF::N) {
    const int n = static_cast<int>(smaller(VecF::N, D - d));
    const VecF x = load_dims(row, d, D) * factor;
    (x * load_dims(norm.weight, d, D)).store_partial(to + d, n);
  }
}

template <class T>
SBF_INLINE void pack_row(Fp32, const T* row, int64_t D, float* to) {
  for (int64_t d = 0; d < D; d += VecF::N) load_dims(row, d, D).store(to + d);
}

// One step of the value panel: kValuesPerSlot rows, chunk_stride between chunks of kLanes dims.
template <class T>
SBF_INLINE void pack_values(Fp32, const T* rows, int64_t, int64_t, int64_t D, float* to,
                            int64_t chunk_stride) {
  for (int64_t d = 0; d < D; d += VecF::N) {
    load_dims(rows, d, D).store(to + d / kLanes * chunk_stride + d % kLanes);
  }
}

#if defined(__AVX512BF16__)
SBF_INLINE void pack_row(Bf16Pairs, const bf16* row, int64_t D, float* to) {
  for (int64_t d = 0; d < D; d += 2 * VecF::N) {
    const int n = static_cast<int>(smaller(2 * VecF::N, D - d));
    load_pairs(row + d, n).store(to + d / 2);
  }
}
SBF_INLINE void pack_row(Bf16Pairs, const float* row, int64_t D, float* to) {
  bf16* halves = reinterpret_cast<bf16*>(to);
  for (int64_t d = 0; d < D; d += VecF::N) store_bf16(halves + d, load_dims(row, d, D));
}

SBF_INLINE void pack_values(Bf16Pairs, const bf16* rows, int64_t stride, int64_t count, int64_t D,
                            float* to, int64_t chunk_stride) {
  for (int64_t d = 0; d < D; d += VecF::N) {
    const VecF even = load_dims(rows, d, D);
    const VecF odd = count > 1 ? load_dims(rows + stride, d, D) : VecF::zero();
    interleave_pairs(even, odd).store(to + d / kLanes * chunk_stride + d % kLanes);
  }
}
#endif

// Rows of q or k, normed and rotated if asked: panel[r][slots], panel_stride apart.
template <class Operand, class T>
void pack_rows(const T* rows, int64_t stride, int64_t count, int64_t D, HeadNorm norm,
               Rotary rotary, float* panel, int64_t panel_stride) {
  const bool rotates = rotary.cos != nullptr;
  float normed[kMaxHeadDim], rotated[kMaxHeadDim];
  for (int64_t r = 0; r < count; ++r) {
    const T* row = rows + r * stride;
    float* to = panel + r * panel_stride;
    const int64_t at = r * (D / 2);
    if (norm.weight != nullptr) {
      norm_row(row, D, norm, normed);
      if (rotates) rotate_row(normed, D, rotary.cos + at, rotary.sin + at, rotated);
      pack_row(Operand{}, rotates ? rotated : normed, D, to);
    } else if (rotates) {
      rotate_row(row, D, rotary.cos + at, rotary.sin + at, rotated);
      pack_row(Operand{}, rotated, D, to);
    } else {
      pack_row(Operand{}, row, D, to);
    }
  }
}

// columns[slot][query] of `count` packed query rows; lanes up to the next whole vector are zero.
SBF_INLINE void transpose_rows(float* rows, int64_t stride, int64_t count, int64_t slots,
                               float* columns) {
  const int64_t padded = round_up(count, VecF::N);
  for (int64_t i = count * stride; i < padded * stride; ++i) rows[i] = 0.0f;
  for (int64_t lane = 0; lane < padded; lane += VecF::N) {
    for (int64_t slot = 0; slot < slots; slot += 4) {
      transpose4(rows + lane * stride + slot, stride, columns + slot * kLanes + lane, kLanes);
    }
  }
}

}  // namespace sbert_fast::cpu::SBF_ISA
