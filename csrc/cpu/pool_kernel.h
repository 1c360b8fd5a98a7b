// segment_pool: one fp32 row per segment, tokens added in order, then L2.
//
// A block of columns lives in registers while the tokens of the segment go by. Sums carry what each
// addition rounds away, so that their error does not grow with the length of the segment.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace sbert_fast::cpu::SBF_ISA {

// As in torch.nn.functional.normalize.
constexpr float kNormalizeEps = 1e-12f;

/// Compensated sum of tokens.
struct Sum {
  VecF total = VecF::zero(), lost = VecF::zero();

  SBF_INLINE void add(VecF x, int64_t) {
    const VecF next = total + x;
    lost = lost + (x + (total - next));
    total = next;
  }
  SBF_INLINE VecF value() const {  // what was lost means nothing beside infinity or NaN
    return select_lt(abs(total), VecF::set1(__builtin_inff()), total + lost, total);
  }
};

/// Compensated sum of tokens times their position + 1.
struct WeightedSum {
  VecF total = VecF::zero(), lost = VecF::zero();

  SBF_INLINE void add(VecF x, int64_t position) {
    const VecF weight = VecF::set1(static_cast<float>(position + 1));
    const VecF next = fma(x, weight, total);
    lost = lost + fma(x, weight, total - next);
    total = next;
  }
  SBF_INLINE VecF value() const { return Sum{total, lost}.value(); }
};

/// Largest token; NaN where one is NaN.
struct Max {
  VecF total = VecF::set1(-__builtin_inff());

  SBF_INLINE void add(VecF x, int64_t) { total = max_nan(total, x); }
  SBF_INLINE VecF value() const { return total; }
};

/// Accumulates positions [first, last) of the rows x and divides by `divisor`: row[0, E).
template <class Accumulator, class T>
SBF_INLINE void reduce_tokens(const T* x, int64_t stride, int64_t first, int64_t last, int64_t E,
                              float divisor, float* row) {
  constexpr int64_t N = VecF::N;
  constexpr int kBlock = 4;
  const VecF scale = VecF::set1(divisor);
  int64_t e = 0;
  for (; e + kBlock * N <= E; e += kBlock * N) {
    Accumulator columns[kBlock];
    for (int64_t t = first; t < last; ++t) {
      const T* token = x + t * stride + e;
      for (int i = 0; i < kBlock; ++i) columns[i].add(load_as<T>(token + i * N), t);
    }
    for (int i = 0; i < kBlock; ++i) (columns[i].value() / scale).store(row + e + i * N);
  }
  for (; e < E; e += N) {
    const int n = static_cast<int>(E - e < N ? E - e : N);
    Accumulator column;
    for (int64_t t = first; t < last; ++t) {
      column.add(load_as_partial<T>(x + t * stride + e, n), t);
    }
    (column.value() / scale).store_partial(row + e, n);
  }
}

/// row[0, E) = x[0, E) in fp32.
template <class T>
SBF_INLINE void copy_token(const T* x, int64_t E, float* row) {
  constexpr int64_t N = VecF::N;
  int64_t e = 0;
  for (; e + N <= E; e += N) load_as<T>(x + e).store(row + e);
  if (e < E) {
    const int n = static_cast<int>(E - e);
    load_as_partial<T>(x + e, n).store_partial(row + e, n);
  }
}

SBF_INLINE void zero_row(int64_t E, float* row) {
  for (int64_t e = 0; e < E; ++e) row[e] = 0.0f;
}

SBF_INLINE void l2_normalize_row(int64_t E, float* row) {
  constexpr int64_t N = VecF::N;
  VecF squares = VecF::zero();
  int64_t e = 0;
  for (; e + N <= E; e += N) {
    const VecF v = VecF::load(row + e);
    squares = fma(v, v, squares);
  }
  const int n = static_cast<int>(E - e);
  const VecF tail = VecF::load_partial(row + e, n);
  const float norm = __builtin_sqrtf(reduce_add(fma(tail, tail, squares)));
  const VecF divisor = VecF::set1(norm < kNormalizeEps ? kNormalizeEps : norm);  // NaN stays
  for (e = 0; e + N <= E; e += N) (VecF::load(row + e) / divisor).store(row + e);
  (tail / divisor).store_partial(row + e, n);
}

/// Pools the tokens x[0, length) of one segment into row[0, E).
template <class T>
SBF_INLINE void pool_segment(const SegmentPoolParams& p, const T* x, int64_t length, float* row) {
  const int64_t E = p.E, stride = p.x_stride, skip = p.skip;
  if (p.mode == PoolMode::kCls && length > 0) {
    return copy_token(x + (length > skip ? skip : 0) * stride, E, row);
  }
  if (length <= skip) return zero_row(E, row);
  const float kept = static_cast<float>(length - skip);
  switch (p.mode) {
    case PoolMode::kMean:
      return reduce_tokens<Sum>(x, stride, skip, length, E, kept, row);
    case PoolMode::kMeanSqrtLen:
      return reduce_tokens<Sum>(x, stride, skip, length, E, __builtin_sqrtf(kept), row);
    case PoolMode::kWeightedMean: {
      const int64_t weights = length * (length + 1) / 2 - skip * (skip + 1) / 2;
      const float total = static_cast<float>(weights);
      return reduce_tokens<WeightedSum>(x, stride, skip, length, E, total, row);
    }
    case PoolMode::kMax:
      return reduce_tokens<Max>(x, stride, skip, length, E, 1.0f, row);
    default:  // the last token
      return copy_token(x + (length - 1) * stride, E, row);
  }
}

template <class T>
void segment_pool(const SegmentPoolParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t start = p.starts[i * p.step];
    const int64_t length = p.ends[i * p.step] - start;
    float* row = p.out + (p.out_rows != nullptr ? p.out_rows[i] : i) * p.out_stride;
    pool_segment(p, static_cast<const T*>(p.x) + start * p.x_stride, length, row);
    if (p.normalize) l2_normalize_row(p.E, row);
  }
}

}  // namespace sbert_fast::cpu::SBF_ISA
