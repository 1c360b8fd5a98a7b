// bias_gelu: out[t] = gelu(x[t] + bias), one read and one write of every element.
//
// A thread owns eight neighbouring columns of four neighbouring rows: the bias is read once for
// them, and four loads are under way at a time.
//
// Both forms are gelu(v) = max(v, 0) - a tail(a), a = |v|, where tail falls from 1/2 to 0: nothing
// cancels on the negative side.
//
//   erf form    tail(a) = erfc(a / sqrt(2)) / 2 = 2^p(a), p the minimax polynomial of degree 8 of
//               kernels/triton/bias_gelu.py: |gelu - exact| is below 4e-8
//   tanh form   tail(a) = 1 / (1 + 2^q(a)), q(a) = 2 sqrt(2 / pi) log2(e) (a + 0.044715 a^3)
//
// Numerics: evaluated in fp32, one rounding. a ends at 20, where the tail is nothing in any dtype
// and infinity times nothing is not NaN.
#pragma once

#include "params.h"
#include "rows.cuh"

namespace sbert_fast::cuda {

inline constexpr int kGeluThreads = 128;
inline constexpr int kGeluRows = 4;

SBF_DEVICE float erf_tail(float a) {
  float p = fma(a, -1.3203846265241737e-06f, 2.0876668713754043e-05f);
  p = fma(p, a, -9.617587056709453e-05f);
  p = fma(p, a, -0.0003608611586969346f);
  p = fma(p, a, 0.007367414887994528f);
  p = fma(p, a, -0.05271776765584946f);
  p = fma(p, a, -0.45912966132164f);
  p = fma(p, a, -1.1511152982711792f);
  return exp2_approx(fma(p, a, -1.0f));
}

SBF_DEVICE float tanh_tail(float a) {
  const float power = exp2_approx(a * fma(a * a, 0.1029432397f, 2.302208198f));
  // 1 / y as the square of 1 / sqrt(y): two instructions where a division takes ten.
  const float root = rsqrt_approx(1.0f + power);
  return root * root;
}

template <bool kTanh>
SBF_DEVICE float gelu(float v) {
  const float size = fabsf(v);
  const float a = size > 20.0f ? 20.0f : size;  // NaN stays
  const float tail = kTanh ? tanh_tail(a) : erf_tail(a);
  return fma(-a, tail, v > 0.0f ? v : 0.0f);
}

template <class T, bool kTanh>
SBF_KERNEL(kGeluThreads, 8)
bias_gelu_kernel(BiasGeluParams params) {
  const uint32_t pieces = static_cast<uint32_t>(params.F) / 8;
  const uint32_t thread =
      static_cast<uint32_t>(block_index()) * kGeluThreads + static_cast<uint32_t>(thread_index());
  const uint32_t column = thread % pieces * 8;
  const int64_t first = static_cast<int64_t>(thread / pieces) * kGeluRows;
  if (first >= params.T) return;
  const int64_t rows = params.T - first;
  const int64_t start = first * params.F + column;

  const T* x = static_cast<const T*>(params.x) + start;
  Vector raw[kGeluRows];
#pragma unroll
  for (int r = 0; r < kGeluRows; ++r) raw[r] = load_16(x + (r < rows ? r : 0) * int64_t{params.F});
  float bias[8] = {};
  if (params.bias != nullptr) load_8(bias, params.bias + column);

  T* out = static_cast<T*>(params.out) + start;
#pragma unroll
  for (int r = 0; r < kGeluRows; ++r) {
    Vector result;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = unpack<T>(raw[r].word[j]);
      result.word[j] =
          pack<T>(gelu<kTanh>(pair.x + bias[2 * j]), gelu<kTanh>(pair.y + bias[2 * j + 1]));
    }
    if (r < rows) store_16(out + r * int64_t{params.F}, result);
  }
}

}  // namespace sbert_fast::cuda
