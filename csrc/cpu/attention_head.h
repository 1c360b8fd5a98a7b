// Where one head of one sequence lies, and which keys its queries see.
#pragma once

#include "attention_pack.h"
#include "kernels.h"

namespace sbert_fast::cpu::SBF_ISA {

constexpr float kLog2e = 1.44269504f;

template <class T>
struct HeadRows {
  HeadRows() = default;

  HeadRows(const AttentionParams& p, int64_t sequence, int64_t head) {
    const int64_t first = p.cu_seqlens[sequence], D = p.D;
    length = p.cu_seqlens[sequence + 1] - first;
    readable = p.T - first;
    stride = (p.H + 2 * p.kv_heads) * D;
    out_stride = p.H * D;
    const T* token = static_cast<const T*>(p.qkv) + first * stride;
    q = token + head * D;
    k = token + (p.H + head / (p.H / p.kv_heads)) * D;
    v = k + p.kv_heads * D;
    out = static_cast<T*>(p.out) + (first * p.H + head) * D;
    half_dim = D / 2;
    if (p.rotary_cos != nullptr) {
      rotary = {p.rotary_cos + first * half_dim, p.rotary_sin + first * half_dim};
    }
    reach = p.R;
    if (p.bias != nullptr) bias = p.bias + head * (2 * p.R + 1) + p.R;
    before = p.window < 0 ? length : smaller(p.window, length);
    after = p.causal ? 0 : before;
  }

  // Asks for `rows` rows of q, k, v and out. Always inline: GCC takes a function that only
  // prefetches for one without effect and drops the call.
  SBF_INLINE void prefetch(int64_t rows, int64_t D) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < D; d += kLine) {
        __builtin_prefetch(q + r * stride + d);
        __builtin_prefetch(k + r * stride + d);
        __builtin_prefetch(v + r * stride + d);
        __builtin_prefetch(out + r * out_stride + d, 1);
      }
    }
  }

  SBF_INLINE void prefetch_keys(int64_t rows, int64_t D) const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < D; d += 64 / sizeof(T)) {
        __builtin_prefetch(k + r * stride + d);
        __builtin_prefetch(v + r * stride + d);
      }
    }
  }

  Rotary rotary_at(int64_t token) const {
    if (rotary.cos == nullptr) return rotary;
    return {rotary.cos + token * half_dim, rotary.sin + token * half_dim};
  }

  bool has_terms() const { return bias != nullptr || after < length; }

  // What is added to the score of a key that is `ahead` positions after its query.
  float term(int64_t ahead) const {
    if (ahead > after || ahead < -before) return -__builtin_inff();
    return bias == nullptr ? 0.0f : bias[larger(-reach, smaller(reach, ahead))];
  }

  int64_t length = 0, readable = 0;    // rows, and those with others that follow in memory
  int64_t stride = 0, out_stride = 0;  // elements between the rows of q, k and v, and those of out
  const T *q = nullptr, *k = nullptr, *v = nullptr;
  T* out = nullptr;
  Rotary rotary{};
  const float* bias = nullptr;    // of a key at its query
  int64_t before = 0, after = 0;  // how far away a query sees keys

 private:
  int64_t half_dim = 0, reach = 0;
};

}  // namespace sbert_fast::cpu::SBF_ISA
