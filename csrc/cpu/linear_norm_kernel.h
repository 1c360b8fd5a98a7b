// linear_norm: the linear layer of some rows, then LayerNorm with the residual while they are in
// the cache.
#pragma once

#include "linear_kernel.h"
#include "norm_kernels.h"

namespace sbert_fast::cpu::SBF_ISA {

// X is what the layer multiplies, T what is added and comes out.
template <class X, class T = X, RangeKernel<LinearParams> kLinear = linear<X, float>>
void linear_norm(const LinearNormParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item * p.linear.item_rows, left = p.linear.T - row;
    LinearParams part = p.linear;
    part.x = static_cast<const X*>(p.linear.x) + row * p.linear.K;
    if (part.row_scales != nullptr) part.row_scales += 2 * row;
    part.out = p.scratch;
    part.T = left < part.item_rows ? left : part.item_rows;
    kLinear(part, 0, 1);
    AddNormParams rows = p.norm;
    rows.x = p.scratch;
    rows.residual = static_cast<const T*>(p.norm.residual) + row * p.norm.E;
    rows.out = static_cast<T*>(p.norm.out) + row * p.norm.E;
    add_norm<float, T>(rows, 0, part.T);
  }
}

}  // namespace sbert_fast::cpu::SBF_ISA
