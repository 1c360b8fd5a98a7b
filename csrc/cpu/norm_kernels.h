// embed_norm and add_norm: a row source, summed in fp32, and one LayerNorm over it.
//
//   y = (v - mean(v)) / sqrt(mean((v - mean(v))^2) + eps) * weight + bias
//
// Statistics take two passes over a row that stays in L1: the mean first, then the centred
// variance. Each sum runs through four accumulators in an order that depends on E alone.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace sbert_fast::cpu::SBF_ISA {

/// Longest row, in elements, that is kept in fp32 between the passes.
constexpr int64_t kMaxSummed = 4096;

/// Elements v[0, E) of one row of add_norm.
template <class X, class T, bool kHasBias, bool kHasResidual>
struct AddRow {
  const X* x;
  const float* bias;
  const T* residual;

  SBF_INLINE VecF load(int64_t e) const {
    VecF v = load_as<X>(x + e);
    if constexpr (kHasBias) v = v + VecF::load(bias + e);
    if constexpr (kHasResidual) v = v + load_as<T>(residual + e);
    return v;
  }
  SBF_INLINE VecF load_partial(int64_t e, int n) const {
    VecF v = load_as_partial<X>(x + e, n);
    if constexpr (kHasBias) v = v + VecF::load_partial(bias + e, n);
    if constexpr (kHasResidual) v = v + load_as_partial<T>(residual + e, n);
    return v;
  }
};

/// Elements v[0, E) of one row of embed_norm.
template <class T, bool kHasPosition, bool kHasType>
struct EmbedRow {
  const T* word;
  const T* position;
  const T* type;

  SBF_INLINE VecF load(int64_t e) const {
    VecF v = load_as<T>(word + e);
    if constexpr (kHasPosition) v = v + load_as<T>(position + e);
    if constexpr (kHasType) v = v + load_as<T>(type + e);
    return v;
  }
  SBF_INLINE VecF load_partial(int64_t e, int n) const {
    VecF v = load_as_partial<T>(word + e, n);
    if constexpr (kHasPosition) v = v + load_as_partial<T>(position + e, n);
    if constexpr (kHasType) v = v + load_as_partial<T>(type + e, n);
    return v;
  }
};

/// A row that is already summed, in fp32.
struct SummedRow {
  const float* v;

  SBF_INLINE VecF load(int64_t e) const { return VecF::load(v + e); }
  SBF_INLINE VecF load_partial(int64_t e, int n) const { return VecF::load_partial(v + e, n); }
};

/// Sum of term(v[e]) over a row; `keep(e, v)` sees the elements from e on, zeros after the last.
template <class Row, class Term, class Keep>
SBF_INLINE float sum_row(const Row& row, int64_t E, Term term, Keep keep) {
  constexpr int kBlock = 4;
  constexpr int64_t N = VecF::N;
  VecF total[kBlock] = {VecF::zero(), VecF::zero(), VecF::zero(), VecF::zero()};
  int64_t e = 0;
  for (; e + kBlock * N <= E; e += kBlock * N) {
    for (int i = 0; i < kBlock; ++i) {
      const VecF v = row.load(e + i * N);
      keep(e + i * N, v);
      total[i] = total[i] + term(v);
    }
  }
  for (; e + N <= E; e += N) {
    const VecF v = row.load(e);
    keep(e, v);
    total[0] = total[0] + term(v);
  }
  if (e < E) {
    const int n = static_cast<int>(E - e);
    const VecF v = row.load_partial(e, n);
    keep(e, v);
    total[1] = total[1] + blend_first(n, term(v), VecF::zero());
  }
  return reduce_add((total[0] + total[1]) + (total[2] + total[3]));
}

/// 1 / sqrt(variance + eps) of a row, once its mean is known.
template <class Row>
SBF_INLINE float inverse_deviation(const Row& row, float mean_value, int64_t E, float eps) {
  const VecF mean = VecF::set1(mean_value);
  const float squares =
      sum_row(row, E, [mean](VecF v) { return (v - mean) * (v - mean); }, [](int64_t, VecF) {});
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(E) + eps);
}

template <class Out, class Row>
SBF_INLINE void store_normalized(const Row& row, float mean_value, float rstd_value,
                                 const float* weight, const float* bias, int64_t E, Out* out) {
  constexpr int64_t N = VecF::N;
  const VecF mean = VecF::set1(mean_value), rstd = VecF::set1(rstd_value);
  int64_t e = 0;
  for (; e + N <= E; e += N) {
    const VecF v = (row.load(e) - mean) * rstd;
    store_rounded<Out>(out + e, fma(v, VecF::load(weight + e), VecF::load(bias + e)));
  }
  if (e < E) {
    const int n = static_cast<int>(E - e);
    const VecF v = (row.load_partial(e, n) - mean) * rstd;
    const VecF scale = VecF::load_partial(weight + e, n);
    store_as_partial<Out>(out + e, fma(v, scale, VecF::load_partial(bias + e, n)), n);
  }
}

/// The second half of LayerNorm, once the mean is known.
template <class Out, class Row>
SBF_INLINE void normalize_row(const Row& row, float mean, const float* weight, const float* bias,
                              int64_t E, float eps, Out* out) {
  const float rstd = inverse_deviation(row, mean, E, eps);
  store_normalized(row, mean, rstd, weight, bias, E, out);
}

// RMSNorm is the same with a mean of zero.
template <class Out, class Row>
SBF_INLINE void norm_row(const Row& row, const float* weight, const float* bias, int64_t E,
                         float eps, bool rms, Out* out) {
  const auto value = [](VecF v) { return v; };
  const float size = static_cast<float>(E);
  if (E > kMaxSummed) {  // summed anew in each pass
    const float mean = rms ? 0.0f : sum_row(row, E, value, [](int64_t, VecF) {}) / size;
    return normalize_row(row, mean, weight, bias, E, eps, out);
  }
  alignas(64) float summed[kMaxSummed + VecF::N];
  const auto keep = [&summed](int64_t e, VecF v) { v.store(summed + e); };
  const float sum = sum_row(row, E, value, keep);
  const float mean = rms ? 0.0f : sum / size;
  normalize_row(SummedRow{summed}, mean, weight, bias, E, eps, out);
}

/// The row itself, rounded.
template <class Out, class Row>
SBF_INLINE void store_row(const Row& row, int64_t E, Out* out) {
  int64_t e = 0;
  for (; e + VecF::N <= E; e += VecF::N) store_as<Out>(out + e, row.load(e));
  if (e < E) {
    const int n = static_cast<int>(E - e);
    store_as_partial<Out>(out + e, row.load_partial(e, n), n);
  }
}

template <class X, class T, bool kHasBias, bool kHasResidual>
void add_norm_rows(const AddNormParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t offset = t * p.E;
    const AddRow<X, T, kHasBias, kHasResidual> row{
        static_cast<const X*>(p.x) + offset, p.bias,
        kHasResidual ? static_cast<const T*>(p.residual) + offset : nullptr};
    norm_row(row, p.weight, p.ln_bias, p.E, p.eps, p.rms, static_cast<T*>(p.out) + offset);
    if (p.sum != nullptr) store_row(row, p.E, static_cast<T*>(p.sum) + offset);
  }
}

template <class X, class T>
void add_norm(const AddNormParams& p, int64_t begin, int64_t end) {
  if (p.bias != nullptr && p.residual != nullptr)
    return add_norm_rows<X, T, true, true>(p, begin, end);
  if (p.bias != nullptr) return add_norm_rows<X, T, true, false>(p, begin, end);
  if (p.residual != nullptr) return add_norm_rows<X, T, false, true>(p, begin, end);
  add_norm_rows<X, T, false, false>(p, begin, end);
}

template <class T, class Out, bool kHasPosition, bool kHasType>
void embed_norm_rows(const EmbedNormParams& p, int64_t begin, int64_t end) {
  const auto* word = static_cast<const T*>(p.word);
  const auto* position_table = static_cast<const T*>(p.position_table);
  const auto* type_table = static_cast<const T*>(p.type_table);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t type = p.types != nullptr ? p.types[t] : 0;
    const EmbedRow<T, kHasPosition, kHasType> row{
        word + p.ids[t] * p.E, kHasPosition ? position_table + p.positions[t] * p.E : nullptr,
        kHasType ? type_table + type * p.E : nullptr};
    Out* const out = static_cast<Out*>(p.out) + t * p.E;
    if (p.weight == nullptr) {
      store_row(row, p.E, out);
    } else {
      norm_row(row, p.weight, p.bias, p.E, p.eps, p.rms, out);
    }
  }
}

template <class T, class Out>
void embed_norm(const EmbedNormParams& p, int64_t begin, int64_t end) {
  const bool has_position = p.position_table != nullptr, has_type = p.type_table != nullptr;
  if (has_position && has_type) return embed_norm_rows<T, Out, true, true>(p, begin, end);
  if (has_position) return embed_norm_rows<T, Out, true, false>(p, begin, end);
  if (has_type) return embed_norm_rows<T, Out, false, true>(p, begin, end);
  embed_norm_rows<T, Out, false, false>(p, begin, end);
}

}  // namespace sbert_fast::cpu::SBF_ISA
