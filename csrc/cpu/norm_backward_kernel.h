// The gradient of add_norm. With n = (v - mean) rstd and u = d_out weight, over a row of E:
//
//   d_v = (u - mean(u) - n mean(u n)) rstd, for RMSNorm without mean(u)
//
// and what the sum v has for a gradient of its own, where it was a result too (add_norm_sum).
// Sums over rows, for the parameters, are taken in chunks of a fixed number of rows.
#pragma once

#include "norm_kernels.h"

namespace sbert_fast::cpu::SBF_ISA {

/// Elements [e, e + n) of rows, n = N where kWhole.
template <bool kWhole>
struct Part {
  int64_t e;
  int n;

  template <class Row>
  SBF_INLINE VecF of(const Row& row) const {
    return kWhole ? row.load(e) : row.load_partial(e, n);
  }
  template <class T>
  SBF_INLINE VecF load(const T* row) const {
    return kWhole ? load_as<T>(row + e) : load_as_partial<T>(row + e, n);
  }
  template <class T>
  SBF_INLINE void store(T* row, VecF v) const {
    kWhole ? store_as<T>(row + e, v) : store_as_partial<T>(row + e, v, n);
  }
  SBF_INLINE void add(float* row, VecF v) const { store(row, load(row) + v); }
};

template <class Body>
SBF_INLINE void for_each_part(int64_t E, Body body) {
  int64_t e = 0;
  for (; e + VecF::N <= E; e += VecF::N) body(Part<true>{e, VecF::N});
  if (e < E) body(Part<false>{e, static_cast<int>(E - e)});
}

// `grad_sum` is the gradient of the sum that the row is of, or null.
template <class T, class Row>
SBF_INLINE void norm_backward_row(const Row& row, const T* grad, const T* grad_sum,
                                  const AddNormBackwardParams& p, T* d_x, float* sums) {
  const int64_t E = p.E;
  const float size = static_cast<float>(E);
  const auto value = [](VecF v) { return v; };
  const float mean = p.rms ? 0.0f : sum_row(row, E, value, [](int64_t, VecF) {}) / size;
  const float deviation = inverse_deviation(row, mean, E, p.eps);
  const VecF centre = VecF::set1(mean), rstd = VecF::set1(deviation);

  VecF straight = VecF::zero(), along = VecF::zero();
  for_each_part(E, [&](auto part) {
    const VecF normed = (part.of(row) - centre) * rstd;
    const VecF upstream = part.load(grad);
    const VecF u = upstream * part.load(p.weight);
    straight = straight + u;
    along = fma(u, normed, along);
    part.add(sums, upstream * normed);
    part.add(sums + E, upstream);
  });
  const VecF level = VecF::set1(p.rms ? 0.0f : reduce_add(straight) / size);
  const VecF slope = VecF::set1(reduce_add(along) / size);
  for_each_part(E, [&](auto part) {
    const VecF normed = (part.of(row) - centre) * rstd;
    const VecF u = part.load(grad) * part.load(p.weight);
    VecF d = (u - level - normed * slope) * rstd;
    if (grad_sum != nullptr) d = d + part.load(grad_sum);
    part.store(d_x, d);
    part.add(sums + 2 * E, d);
  });
}

template <class T, bool kHasBias, bool kHasResidual>
void norm_backward_chunk(const AddNormBackwardParams& p, int64_t chunk) {
  float* sums = p.sums + chunk * 3 * p.E;
  for_each_part(3 * p.E, [&](auto part) { part.store(sums, VecF::zero()); });
  const int64_t first = chunk * kNormChunk, last = first + kNormChunk;
  for (int64_t t = first; t < (last < p.T ? last : p.T); ++t) {
    const int64_t offset = t * p.E;
    const AddRow<T, T, kHasBias, kHasResidual> row{
        static_cast<const T*>(p.x) + offset, p.bias,
        kHasResidual ? static_cast<const T*>(p.residual) + offset : nullptr};
    const T* grad_sum = static_cast<const T*>(p.grad_sum);
    norm_backward_row<T>(row, static_cast<const T*>(p.grad) + offset,
                         grad_sum == nullptr ? nullptr : grad_sum + offset, p,
                         static_cast<T*>(p.d_x) + offset, sums);
  }
}

/// Items are chunks of kNormChunk rows.
template <class T>
void add_norm_backward(const AddNormBackwardParams& p, int64_t begin, int64_t end) {
  const bool bias = p.bias != nullptr, residual = p.residual != nullptr;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    if (bias && residual) norm_backward_chunk<T, true, true>(p, chunk);
    if (bias && !residual) norm_backward_chunk<T, true, false>(p, chunk);
    if (!bias && residual) norm_backward_chunk<T, false, true>(p, chunk);
    if (!bias && !residual) norm_backward_chunk<T, false, false>(p, chunk);
  }
}

}  // namespace sbert_fast::cpu::SBF_ISA
