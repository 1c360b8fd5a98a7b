// The gradients of activations, in fp32, each rounded once. Those of gated_activation, out = f(a)
// b, are d_a = d_out b f'(a) and d_b = d_out f(a); that of bias_gelu is d_out f'(x + bias).
#pragma once

#include "activation_kernel.h"
#include "norm_backward_kernel.h"

namespace sbert_fast::cpu::SBF_ISA {

/// f(v) and f'(v).
struct Activated {
  VecF value, slope;
};

SBF_INLINE Activated differentiate(Identity, VecF v) { return {v, VecF::set1(1.0f)}; }

SBF_INLINE Activated differentiate(Silu, VecF v) {
  const VecF one = VecF::set1(1.0f), sigmoid = one / (one + exp(VecF::zero() - v));
  return {v * sigmoid, fma(v * sigmoid, one - sigmoid, sigmoid)};
}

// v Phi(v), Phi being the distribution function of the normal distribution.
SBF_INLINE Activated differentiate(Gelu<ErfTail<float>>, VecF v) {
  const VecF tail = ErfTail<float>()(min(VecF::set1(10.0f), abs(v)));
  const VecF phi = select_lt(v, VecF::zero(), tail, VecF::set1(1.0f) - tail);
  const VecF density = exp(v * v * VecF::set1(-0.5f)) * VecF::set1(0.398942280f);
  return {v * phi, fma(v, density, phi)};
}

// v sigmoid(z), z = 2 sqrt(2 / pi) (v + 0.044715 v^3).
SBF_INLINE Activated differentiate(Gelu<TanhTail<float>>, VecF v) {
  constexpr float kSlope = 2.0f * 0.797884561f;
  const VecF a = min(VecF::set1(10.0f), abs(v)), one = VecF::set1(1.0f);
  const VecF tail = TanhTail<float>()(a);
  const VecF sigmoid = select_lt(v, VecF::zero(), tail, one - tail);
  const VecF d_z = fma(a * a, VecF::set1(3.0f * 0.044715f * kSlope), VecF::set1(kSlope));
  return {v * sigmoid, fma(copysign(a, v) * d_z, tail * (one - tail), sigmoid)};
}

template <class T, bool kHasBias, class Function>
SBF_INLINE void gated_backward_rows(const GatedBackwardParams& p, int64_t begin, int64_t end,
                                    Function f) {
  const GatedParams& forward = p.forward;
  const int64_t F = forward.F, activated = forward.first ? 0 : F, gate = F - activated;
  for (int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(forward.x) + t * 2 * F;
    const T* grad = static_cast<const T*>(p.grad) + t * F;
    T* d_x = static_cast<T*>(p.d_x) + t * 2 * F;
    for_each_part(F, [&](auto part) {
      VecF a = part.load(x + activated), b = part.load(x + gate);
      if constexpr (kHasBias) {
        a = a + part.load(forward.bias + activated);
        b = b + part.load(forward.bias + gate);
      }
      const Activated at = differentiate(f, a);
      const VecF upstream = part.load(grad);
      part.store(d_x + activated, upstream * b * at.slope);
      part.store(d_x + gate, upstream * at.value);
    });
  }
}

template <class T>
void gated_activation_backward(const GatedBackwardParams& p, int64_t begin, int64_t end) {
  with_activation<float>(p.forward.activation, [&](auto f) {
    if (p.forward.bias != nullptr) return gated_backward_rows<T, true>(p, begin, end, f);
    gated_backward_rows<T, false>(p, begin, end, f);
  });
}

template <class T, bool kHasBias, class Function>
SBF_INLINE void gelu_backward_rows(const BiasGeluBackwardParams& p, int64_t begin, int64_t end,
                                   Function f) {
  const BiasGeluParams& forward = p.forward;
  for (int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(forward.x) + t * forward.F;
    const T* grad = static_cast<const T*>(p.grad) + t * forward.F;
    T* d_x = static_cast<T*>(p.d_x) + t * forward.F;
    for_each_part(forward.F, [&](auto part) {
      VecF v = part.load(x);
      if constexpr (kHasBias) v = v + part.load(forward.bias);
      part.store(d_x, part.load(grad) * differentiate(f, v).slope);
    });
  }
}

template <class T>
void bias_gelu_backward(const BiasGeluBackwardParams& p, int64_t begin, int64_t end) {
  const auto run = [&](auto f) {
    if (p.forward.bias != nullptr) return gelu_backward_rows<T, true>(p, begin, end, f);
    gelu_backward_rows<T, false>(p, begin, end, f);
  };
  p.forward.tanh ? run(Gelu<TanhTail<float>>()) : run(Gelu<ErfTail<float>>());
}

}  // namespace sbert_fast::cpu::SBF_ISA
