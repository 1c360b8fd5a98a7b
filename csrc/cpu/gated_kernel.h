// gated_activation: f(a) * b, a and b being the halves of x + bias, in fp32, rounded once.
#pragma once

#include "activation_kernel.h"
#include "kernels.h"
#include "vec.h"

namespace sbert_fast::cpu::SBF_ISA {

template <class T, bool kHasBias, class Function>
SBF_INLINE void gated_rows(const GatedParams& p, int64_t begin, int64_t end, Function f) {
  constexpr int64_t N = VecF::N;
  const int64_t activated = p.first ? 0 : p.F, gate = p.F - activated;
  for (int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(p.x) + t * 2 * p.F;
    T* out = static_cast<T*>(p.out) + t * p.F;
    int64_t c = 0;
    for (; c + N <= p.F; c += N) {
      VecF a = load_as<T>(x + activated + c), b = load_as<T>(x + gate + c);
      if constexpr (kHasBias) {
        a = a + VecF::load(p.bias + activated + c);
        b = b + VecF::load(p.bias + gate + c);
      }
      store_as<T>(out + c, f(a) * b);
    }
    if (c < p.F) {
      const int n = static_cast<int>(p.F - c);
      VecF a = load_as_partial<T>(x + activated + c, n), b = load_as_partial<T>(x + gate + c, n);
      if constexpr (kHasBias) {
        a = a + VecF::load_partial(p.bias + activated + c, n);
        b = b + VecF::load_partial(p.bias + gate + c, n);
      }
      store_as_partial<T>(out + c, f(a) * b, n);
    }
  }
}

template <class T>
void gated_activation(const GatedParams& p, int64_t begin, int64_t end) {
  with_activation<T>(p.activation, [&](auto f) {
    if (p.bias != nullptr) return gated_rows<T, true>(p, begin, end, f);
    gated_rows<T, false>(p, begin, end, f);
  });
}

}  // namespace sbert_fast::cpu::SBF_ISA
