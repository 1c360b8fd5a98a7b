// bias_gelu: gelu(x + bias) in fp32, rounded once to the dtype of x.
//
//   erf form    v / 2 * (1 + erf(v / sqrt(2)))
//   tanh form   v * sigmoid(2 u), u = sqrt(2 / pi) * (v + 0.044715 v^3), which is v / 2 * (1 + tanh(u))
#pragma once

#include "kernels.h"
#include "vec.h"

namespace sbert_fast::cpu::SBF_ISA {

struct ErfGelu {
  SBF_INLINE VecF operator()(VecF v) const {
    const VecF half = v * VecF::set1(0.5f);
    return fma(half, erf(v * VecF::set1(0.70710678f)), half);
  }
};

struct TanhGelu {
  SBF_INLINE VecF operator()(VecF v) const {
    const VecF cubic = fma(v * v, VecF::set1(0.044715f * 2.0f * 0.79788456f),
                           VecF::set1(2.0f * 0.79788456f));
    // e^-|2u| never overflows; sigmoid(2u) is 1 / (1 + e^-2u) for v > 0 and e^2u / (1 + e^2u) below.
    const VecF decay = exp(VecF::zero() - abs(v * cubic));
    const VecF numerator = fma(min(v, VecF::zero()), decay, max(v, VecF::zero()));
    return numerator / (VecF::set1(1.0f) + decay);
  }
};

template <class T, class Gelu, bool kHasBias>
void bias_gelu_rows(const BiasGeluParams& p, int64_t begin, int64_t end) {
  constexpr int64_t N = VecF::N;
  const Gelu gelu;
  for (int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(p.x) + t * p.F;
    T* out = static_cast<T*>(p.out) + t * p.F;
    int64_t f = 0;
    for (; f + N <= p.F; f += N) {
      VecF v = load_as<T>(x + f);
      if constexpr (kHasBias) v = v + VecF::load(p.bias + f);
      store_as<T>(out + f, gelu(v));
    }
    if (f < p.F) {
      const int n = static_cast<int>(p.F - f);
      VecF v = load_as_partial<T>(x + f, n);
      if constexpr (kHasBias) v = v + VecF::load_partial(p.bias + f, n);
      store_as_partial<T>(out + f, gelu(v), n);
    }
  }
}

template <class T>
void bias_gelu(const BiasGeluParams& p, int64_t begin, int64_t end) {
  const bool has_bias = p.bias != nullptr;
  if (p.tanh) {
    return has_bias ? bias_gelu_rows<T, TanhGelu, true>(p, begin, end)
                    : bias_gelu_rows<T, TanhGelu, false>(p, begin, end);
  }
  return has_bias ? bias_gelu_rows<T, ErfGelu, true>(p, begin, end)
                  : bias_gelu_rows<T, ErfGelu, false>(p, begin, end);
}

}  // namespace sbert_fast::cpu::SBF_ISA
