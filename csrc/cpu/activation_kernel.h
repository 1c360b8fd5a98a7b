// The activations of linear and gated_activation, by their numbers.
#pragma once

#include "gelu_kernel.h"
#include "kernels.h"
#include "vec.h"

namespace sbert_fast::cpu::SBF_ISA {

struct Identity {
  SBF_INLINE VecF operator()(VecF v) const { return v; }
};

template <class Tail>
struct Gelu {
  SBF_INLINE VecF operator()(VecF v) const { return gelu<Tail>(v); }
};

/// v * sigmoid(v); minus infinity gives NaN, as in torch.
struct Silu {
  SBF_INLINE VecF operator()(VecF v) const {
    return v / (VecF::set1(1.0f) + exp(VecF::zero() - v));
  }
};

/// body(f), f being the activation of what becomes T.
template <class T, class ErfGelu = Gelu<ErfTail<T>>, class TanhGelu = Gelu<TanhTail<T>>, class Body>
SBF_INLINE void with_activation(Activation activation, Body body) {
  switch (activation) {
    case Activation::kNone:
      return body(Identity());
    case Activation::kGelu:
      return body(ErfGelu());
    case Activation::kGeluTanh:
      return body(TanhGelu());
    case Activation::kSilu:
      return body(Silu());
  }
}

}  // namespace sbert_fast::cpu::SBF_ISA
