// Checks of the values of index tensors: what a kernel would otherwise read or write out of bounds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "checks.h"

namespace sbert_fast::cpu {

/// Requires 0 <= indices[i] < limit for all i; the message names the first index that is not.
inline void check_indices(const char* op, const char* name, const int32_t* indices, int64_t count,
                          int64_t limit, const char* what) {
  uint32_t largest = 0;  // a negative index becomes a large one
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, static_cast<uint32_t>(indices[i]));
  }
  if (count == 0 || largest < static_cast<uint64_t>(limit)) return;
  int64_t i = 0;
  while (indices[i] >= 0 && indices[i] < limit) ++i;
  fail(op, name, '[', i, "] must be in [0, ", limit, "), the rows of ", what, ", got ", indices[i]);
}

/// Requires indices to differ from one another: two threads must not write one row.
inline void check_distinct(const char* op, const char* name, const int32_t* indices,
                           int64_t count) {
  std::vector<int32_t> sorted(indices, indices + count);
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  SBF_CHECK(twice == sorted.end(), op, name, " must name a row at most once, got ", *twice,
            " twice");
}

/// The sequences of a packed batch, checked.
struct Sequences {
  const int32_t* cu;  // [B + 1]
  int64_t B;
  int64_t longest;
};

/// Requires cu_seqlens to be int32 [B + 1], start at 0, never decrease, and end at or before T.
inline Sequences check_cu_seqlens(const char* op, const Tensor& cu_seqlens, int64_t T) {
  check_tensor(op, "cu_seqlens", cu_seqlens, ScalarType::Int, "[B + 1]", {kAnySize});
  const int64_t B = cu_seqlens.size(0) - 1;
  SBF_CHECK(B >= 0, op, "cu_seqlens must be int32 [B + 1], got ", describe(cu_seqlens));
  const auto* cu = cu_seqlens.const_data_ptr<int32_t>();
  SBF_CHECK(cu[0] == 0, op, "cu_seqlens must start at 0, got ", cu[0]);
  int64_t longest = 0;
  for (int64_t b = 0; b < B; ++b) {
    SBF_CHECK(cu[b] <= cu[b + 1], op, "cu_seqlens must never decrease, got ", cu[b + 1], " after ",
              cu[b], " at index ", b + 1);
    longest = std::max<int64_t>(longest, cu[b + 1] - cu[b]);
  }
  SBF_CHECK(cu[B] <= T, op, "cu_seqlens must end at or before T = ", T, ", got ", cu[B]);
  return {cu, B, longest};
}

/// Requires 0 <= start <= end <= limit for every row of spans [P, 2].
inline void check_spans(const char* op, const int32_t* spans, int64_t P, int64_t limit) {
  for (int64_t p = 0; p < P; ++p) {
    const int32_t start = spans[2 * p], end = spans[2 * p + 1];
    SBF_CHECK(0 <= start && start <= end && end <= limit, op, "spans[", p,
              "] must be 0 <= start <= end <= ", limit, ", got [", start, ", ", end, "]");
  }
}

}  // namespace sbert_fast::cpu
