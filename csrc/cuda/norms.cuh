// embed_norm and add_norm: one read and one write of every element.
//
//   embed_norm  out[t] = LN(word[ids[t]] + position_table[positions[t]] + type_table[types[t]])
//   add_norm    out[t] = LN(x[t] + bias + residual[t])
//
// A group of threads holds a row (rows.cuh) and starts all its loads before the first is used.
// Groups behind the last row repeat it and write nothing.
//
// Numerics: fp32 sum and statistics, in two passes (mean, then centred variance); one rounding.
#pragma once

#include "params.h"
#include "rows.cuh"

namespace sbert_fast::cuda {

inline constexpr int kNormThreads = 128;

/// Blocks on a multiprocessor at the least: what the registers of a row leave room for without
/// spills.
template <class Layout>
inline constexpr int kNormBlocks = Layout::kPieces <= 3 ? 8 : 5;

template <class T, class Layout>
SBF_KERNEL(kNormThreads, kNormBlocks<Layout>)
add_norm_kernel(AddNormParams params) {
  SBF_SHARED GroupSums sums;
  const RowLane<Layout> lane(params.E);
  const uint32_t place = group_index<Layout>(kNormThreads);
  const uint32_t last = static_cast<uint32_t>(params.T) - 1;
  const int64_t offset = static_cast<int64_t>(place < last ? place : last) * params.E + lane.start;

  RawRow<Layout> x, residual;
  x.load(static_cast<const T*>(params.x) + offset, lane);
  residual.load_if(params.residual != nullptr, static_cast<const T*>(params.residual) + offset,
                   lane);
  Row<Layout> row;
  row.template assign_sum<T>(x, params.bias, params.has_bias, residual, lane);
  row.multiply(center(row, lane, params.inverse_width, params.eps, sums));
  row.store_scaled(static_cast<T*>(params.out) + offset, place <= last, params.weight,
                   params.ln_bias, lane);
}

template <class T, class Layout>
SBF_KERNEL(kNormThreads, kNormBlocks<Layout>)
embed_norm_kernel(EmbedNormParams params) {
  SBF_SHARED GroupSums sums;
  const RowLane<Layout> lane(params.E);
  const uint32_t place = group_index<Layout>(kNormThreads);
  const uint32_t last = static_cast<uint32_t>(params.T) - 1;
  const int64_t token = place < last ? place : last;
  const int64_t id = params.ids[token];
  const int64_t position = params.positions[token];
  const int32_t type = params.types != nullptr ? params.types[token] : 0;

  RawRow<Layout> word, at;
  word.load(static_cast<const T*>(params.word) + id * params.E + lane.start, lane);
  at.load(static_cast<const T*>(params.position_table) + position * params.E + lane.start, lane);
  Row<Layout> row;
  row.template assign<T>(word);
  row.template add<T>(at);
  if (params.type_table != nullptr) {
    // Two rows that every multiprocessor has at hand.
    RawRow<Layout> kind;
    kind.load(static_cast<const T*>(params.type_table) + int64_t{type} * params.E + lane.start,
              lane);
    row.template add<T>(kind);
  }
  row.multiply(center(row, lane, params.inverse_width, params.eps, sums));
  const int64_t offset = token * params.E + lane.start;
  if (params.out_dtype == kFloat16) {
    row.store_scaled(static_cast<Half*>(params.out) + offset, place <= last, params.weight,
                     params.bias, lane);
  } else {
    row.store_scaled(static_cast<BFloat16*>(params.out) + offset, place <= last, params.weight,
                     params.bias, lane);
  }
}

}  // namespace sbert_fast::cuda
