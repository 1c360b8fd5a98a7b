// Rows as narrow weights multiply them. quantize_rows: as bytes, each with a scale of its own, for
// int8 weights; split_rows: as sums of two bf16, for split ones.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace sbert_fast::cpu::SBF_ISA {

// The smallest and the largest value of a row and of zero, and zero: NaN if any value is not
// finite.
struct RowRange {
  VecF smallest = VecF::zero(), largest = VecF::zero(), zero = VecF::zero();

  SBF_INLINE void add(VecF v) {
    smallest = min(v, smallest);
    largest = max(v, largest);
    zero = fma(v, VecF::zero(), zero);
  }
};

// The bytes leave room for what rounding may add at both ends. A row that holds NaN or infinity has
// a scale of NaN, and so NaN is all that comes of it.
template <class T>
void quantize_rows(const QuantizeParams& p, int64_t begin, int64_t end) {
  constexpr float kSteps = 253.0f;
  for (int64_t t = begin; t < end; ++t) {
    const T* const x = static_cast<const T*>(p.x) + t * p.K;
    uint8_t* const out = p.out + t * p.K;
    const int64_t whole = p.K / VecF::N * VecF::N;
    const int rest = static_cast<int>(p.K - whole);
    RowRange range;
    for (int64_t k = 0; k < whole; k += VecF::N) range.add(load_as<T>(x + k));
    if (rest > 0) range.add(load_as_partial<T>(x + whole, rest));
    const float smallest = -reduce_max(VecF::zero() - range.smallest);
    const float width = reduce_max(range.largest) - smallest;
    const float inverse_value = width > 1e-30f ? kSteps / width : 0.0f;
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const VecF magic = VecF::set1(12582912.0f), inverse = VecF::set1(inverse_value);
    const VecF shifted = fused(VecF::set1(-smallest), inverse, magic) + VecF::set1(1.0f);
    p.scales[2 * t] = width / kSteps + reduce_add(range.zero);
    p.scales[2 * t + 1] = reduce_max(shifted - magic);
    for (int64_t k = 0; k < whole; k += VecF::N) {
      store_low_bytes(out + k, fused(load_as<T>(x + k), inverse, shifted));
    }
    if (rest > 0) {
      uint8_t bytes[VecF::N];
      store_low_bytes(bytes, fused(load_as_partial<T>(x + whole, rest), inverse, shifted));
      for (int i = 0; i < rest; ++i) out[whole + i] = bytes[i];
    }
  }
}

// Infinity leaves NaN, and so NaN is all that comes of its row.
inline void split_rows(const SplitParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin * p.K; i < end * p.K; i += kSplitInputs) {
    bf16* const out = static_cast<bf16*>(p.out) + 2 * i;
    for (int64_t k = 0; k < kSplitInputs; k += VecF::N) {
      const VecF v = VecF::load(p.x + i + k);
      store_rounded<bf16>(out + k, v);
      store_rounded<bf16>(out + kSplitInputs + k, v - load_bf16(out + k));
    }
  }
}

}  // namespace sbert_fast::cpu::SBF_ISA
