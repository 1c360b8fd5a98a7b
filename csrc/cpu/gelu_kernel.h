// bias_gelu: gelu(x + bias) in fp32, rounded once to the dtype of x.
//
// Both forms are gelu(v) = max(v, 0) - a * tail(a), a = |v|, where tail falls from 1/2 to 0:
// nothing cancels on the negative side. The tail is evaluated as a power of two: to fp32 accuracy,
// or, where the result becomes bf16, to 2e-4 of its value, a tenth of what that rounding changes.
//
//   erf form    tail(a) = erfc(a / sqrt(2)) / 2
//   tanh form   tail(a) = sigmoid(-2 sqrt(2 / pi) (a + 0.044715 a^3))
#pragma once

#include "kernels.h"
#include "vec.h"

namespace sbert_fast::cpu::SBF_ISA {

/// 2^y for -126 <= y <= 0, relative error below 2e-7, or 2e-4 for bf16; NaN stays.
template <class T>
SBF_INLINE VecF exp2_tail(VecF y) {
  // Adding 1.5 * 2^23 rounds y to an integer and leaves that in the low bits.
  const VecF magic = VecF::set1(12582912.0f);
  const VecF t = y + magic;
  const VecF r = y - (t - magic);
  VecF q;
  if constexpr (sizeof(T) == sizeof(bf16)) {
    q = VecF::set1(5.50089478e-2f);
    q = fma(q, r, VecF::set1(2.42211163e-1f));
    q = fma(q, r, VecF::set1(6.93282962e-1f));
  } else {
    q = VecF::set1(1.32647273e-3f);
    q = fma(q, r, VecF::set1(9.67151299e-3f));
    q = fma(q, r, VecF::set1(5.55073358e-2f));
    q = fma(q, r, VecF::set1(2.40222424e-1f));
    q = fma(q, r, VecF::set1(6.93147004e-1f));
  }
  return add_exponent(fma(q, r, VecF::set1(1.0f)), t);
}

// 2^log2_tail(a): a minimax polynomial on [0, 5.2] in the error of a * tail(a). In fp32 that is
// below 2e-8, and the relative error is small too for a < 0.75; in bf16 below 3e-5, or 2e-4
// relative. Both fall on, to 2^-97 and 2^-80 at 10.
template <class T>
struct ErfTail {
  SBF_INLINE VecF operator()(VecF a) const {
    VecF y;
    if constexpr (sizeof(T) == sizeof(bf16)) {
      y = VecF::set1(-3.83866049e-4f);
      y = fma(y, a, VecF::set1(6.42080046e-3f));
      y = fma(y, a, VecF::set1(-5.01757637e-2f));
      y = fma(y, a, VecF::set1(-4.61530805e-1f));
      y = fma(y, a, VecF::set1(-1.1504221f));
    } else {
      y = VecF::set1(-1.558387e-6f);
      y = fma(y, a, VecF::set1(2.4380166e-5f));
      y = fma(y, a, VecF::set1(-1.1648803e-4f));
      y = fma(y, a, VecF::set1(-3.00842512e-4f));
      y = fma(y, a, VecF::set1(7.27038644e-3f));
      y = fma(y, a, VecF::set1(-5.26328534e-2f));
      y = fma(y, a, VecF::set1(-4.59166288e-1f));
      y = fma(y, a, VecF::set1(-1.15110946f));
    }
    return exp2_tail<T>(fma(y, a, VecF::set1(-1.0f)));
  }
};

template <class T>
struct TanhTail {
  SBF_INLINE VecF operator()(VecF a) const {
    constexpr float kSlope = -2.0f * 0.797884561f * 1.44269504f;  // -2 sqrt(2 / pi) log2(e)
    const VecF slope = fma(a * a, VecF::set1(0.044715f * kSlope), VecF::set1(kSlope));
    const VecF power = exp2_tail<T>(a * slope);
    return power / (VecF::set1(1.0f) + power);
  }
};

template <class Tail>
SBF_INLINE VecF gelu(VecF v) {
  // Where a is cut off, both a * tail(a) are below 1e-27 and the power of two is still normal.
  const VecF a = min(VecF::set1(10.0f), abs(v));
  return max(v, VecF::zero()) - a * Tail()(a);
}

template <class T, class Tail, bool kHasBias>
void bias_gelu_rows(const BiasGeluParams& p, int64_t begin, int64_t end) {
  constexpr int64_t N = VecF::N;
  for (int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(p.x) + t * p.F;
    T* out = static_cast<T*>(p.out) + t * p.F;
    int64_t f = 0;
    for (; f + N <= p.F; f += N) {
      VecF v = load_as<T>(x + f);
      if constexpr (kHasBias) v = v + VecF::load(p.bias + f);
      store_as<T>(out + f, gelu<Tail>(v));
    }
    if (f < p.F) {
      const int n = static_cast<int>(p.F - f);
      VecF v = load_as_partial<T>(x + f, n);
      if constexpr (kHasBias) v = v + VecF::load_partial(p.bias + f, n);
      store_as_partial<T>(out + f, gelu<Tail>(v), n);
    }
  }
}

template <class T>
void bias_gelu(const BiasGeluParams& p, int64_t begin, int64_t end) {
  const bool has_bias = p.bias != nullptr;
  if (p.tanh) {
    return has_bias ? bias_gelu_rows<T, TanhTail<T>, true>(p, begin, end)
                    : bias_gelu_rows<T, TanhTail<T>, false>(p, begin, end);
  }
  return has_bias ? bias_gelu_rows<T, ErfTail<T>, true>(p, begin, end)
                  : bias_gelu_rows<T, ErfTail<T>, false>(p, begin, end);
}

}  // namespace sbert_fast::cpu::SBF_ISA
