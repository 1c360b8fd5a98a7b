// Pooling of packed segments into rows of fp32, with or without the LayerNorm before it: one pass
// over the tokens, one launch.
//
//   out[r] = L2(pool(y[first], ..., y[first + n - 1])), y = x or LN(x + bias + residual)
//
// How many threads a segment gets depends on the number n of tokens it pools, and on nothing else:
//
//   n <= 16          a group, which is as many threads as hold a row (rows.cuh)
//   16 < n <= 128    a team of 128 threads; its groups take every so manyth token
//   n > 128          all threads of a block
//
// A block owns every so manyth segment and computes its short ones at once, then as many medium
// ones at a time as it has teams, then the long ones. How many it owns is chosen by the average
// length and changes no figure.
//
// Numerics: fp32 sums in an order fixed by n, E and the dtype: a group adds its tokens one by one,
// then the groups of a team are added as a tree in shared memory. No atomics. LayerNorm's weight
// and bias are applied to the pooled row where pooling is linear, to every token in max pooling.
// The normalised tokens are not rounded.
#pragma once

#include "pool_plan.cuh"

namespace sbert_fast::cuda {

/// The larger number, NaN if one of them is.
SBF_DEVICE float max_nan(float a, float b) { return b > a || b != b ? b : a; }

template <bool kMaxMode>
SBF_DEVICE float merge(float a, float b) {
  return kMaxMode ? max_nan(a, b) : a + b;
}

/// Which tokens a group takes, and how many steps of its loop that is.
struct Tokens {
  int next;
  int end;
  int stride;
  int steps;
};

/// Steps are the same for all threads that must keep together in LayerNorm: those of a warp, or of
/// the block where a group is wider than a warp.
template <class Layout, bool kNorm>
SBF_DEVICE Tokens tokens_of(const PoolShared<Layout, kNorm>& shared, const Team& team) {
  const int kept = team.segment < 0 ? 0 : shared.kept[team.segment];
  const int first = team.segment < 0 ? 0 : shared.first[team.segment];
  int steps = (kept + team.groups - 1) / team.groups;
  if constexpr (kNorm && Layout::kLanes == 16) {
    const int other = shuffle_xor(steps, 16);
    steps = other > steps ? other : steps;
  } else if constexpr (kNorm && Layout::kLanes > 32) {
    for (int i = 0; i < kOwned<Layout, kNorm> && team.groups == 1; ++i) {
      const int others = shared.kept[i];
      steps = others <= kShortTokens && others > steps ? others : steps;
    }
  }
  return {first + team.group, first + kept, team.groups, steps};
}

template <class Layout, bool kMaxMode>
SBF_DEVICE void take(Row<Layout>& total, const Row<Layout>& row, float factor) {
#pragma unroll
  for (int j = 0; j < Layout::kValues; ++j) {
    total.value[j] = kMaxMode ? max_nan(total.value[j], row.value[j])
                              : fma(row.value[j], factor, total.value[j]);
  }
}

/// The tokens of a group added up; or the largest. `offset` makes the weight of a token's number.
template <class T, class Layout, bool kMaxMode>
SBF_DEVICE void add_tokens(const PoolParams& params, const RowLane<Layout>& lane, Tokens tokens,
                           int offset, Row<Layout>& total) {
  const bool weighted = params.mode == kWeightedMean;
  const T* rows = static_cast<const T*>(params.x) + lane.start;
  int token = tokens.next;
  RawRow<Layout> x, y;
  Row<Layout> row;
  // Two at a time, both loaded before the first is used.
#pragma unroll 1
  for (int second; (second = token + tokens.stride) < tokens.end; token = second + tokens.stride) {
    x.load(rows + token * params.x_stride, lane);
    y.load(rows + second * params.x_stride, lane);
    row.template assign<T>(x);
    take<Layout, kMaxMode>(total, row, weighted ? static_cast<float>(token + offset) : 1.0f);
    row.template assign<T>(y);
    take<Layout, kMaxMode>(total, row, weighted ? static_cast<float>(second + offset) : 1.0f);
  }
  if (token >= tokens.end) return;
  x.load(rows + token * params.x_stride, lane);
  row.template assign<T>(x);
  take<Layout, kMaxMode>(total, row, weighted ? static_cast<float>(token + offset) : 1.0f);
}

/// The same of the normalised tokens.
template <class T, class Layout, bool kMaxMode>
SBF_DEVICE void add_normalized(const PoolParams& params, const RowLane<Layout>& lane, Tokens tokens,
                               int offset, GroupSums& sums, Row<Layout>& total) {
  int token = tokens.next;
#pragma unroll 1
  for (int left = tokens.steps; left > 0; --left, token += tokens.stride) {
    // Where there is no token the first of all is read, and not used.
    const int64_t start = (token < tokens.end ? token : 0) * params.x_stride + lane.start;
    RawRow<Layout> x, residual;
    x.load(static_cast<const T*>(params.x) + start, lane);
    residual.load_if(params.residual != nullptr, static_cast<const T*>(params.residual) + start,
                     lane);
    Row<Layout> row;
    row.template assign_sum<T>(x, params.bias, params.has_bias, residual, lane);
    float factor = center(row, lane, params.inverse_width, params.eps, sums);
    if constexpr (kMaxMode) {
      row.multiply(factor);
      row.scale_and_shift(params.weight, params.ln_bias, 1.0f, lane);
    } else if (params.mode == kWeightedMean) {
      factor *= static_cast<float>(token + offset);
    }
    if (token < tokens.end) take<Layout, kMaxMode>(total, row, factor);
  }
}

/// The rows of a team's groups into that of its first one. All threads of the block call.
template <class Layout, bool kNorm, bool kMaxMode>
SBF_DEVICE void merge_groups(PoolShared<Layout, kNorm>& shared, const Team& team,
                             Row<Layout>& total) {
  if constexpr (Layout::kLanes == 16) {
#pragma unroll
    for (int j = 0; j < Layout::kValues; ++j) {
      total.value[j] = merge<kMaxMode>(total.value[j], shuffle_xor(total.value[j], 16));
    }
  }
  constexpr int kGroupsOfUnit = Layout::kUnit / Layout::kLanes;
  const int units = team.groups / kGroupsOfUnit;
  const int unit = team.group / kGroupsOfUnit;
  const int lane = thread_index() % Layout::kUnit;
  // A team has half as many slots as units. What a unit hands over in the first round lies in the
  // slot of the one that takes it, later in its own: nobody else has read there.
  auto* slots = shared.row + (thread_index() / Layout::kUnit - unit) / 2;
  sync_block();  // they are free
  int count = units;
#pragma unroll 1
  while (count > 1) {
    const int half = (count + 1) / 2;
    const int shift = count == units ? half : 0;
    if (half <= unit && unit < count) {
      auto& slot = slots[unit - shift];
#pragma unroll
      for (int j = 0; j < Layout::kValues; ++j) slot[j / 4][lane][j % 4] = total.value[j];
    }
    sync_block();
    if (unit + half < count) {
      const auto& slot = slots[unit + half - shift];
#pragma unroll
      for (int j = 0; j < Layout::kValues; ++j) {
        total.value[j] = merge<kMaxMode>(total.value[j], slot[j / 4][lane][j % 4]);
      }
    }
    count = half;
  }
}

/// The pooled row divided, with LayerNorm's weight and bias, of length 1, to its place.
template <class Layout, bool kNorm, bool kMaxMode>
SBF_DEVICE void finish(const PoolParams& params, PoolShared<Layout, kNorm>& shared,
                       const RowLane<Layout>& lane, const Team& team, Row<Layout>& row) {
  const int kept = team.segment < 0 ? 0 : shared.kept[team.segment];
  float divisor = 1.0f, share = 1.0f;  // of LayerNorm's bias
  if (params.mode == kMean) {
    divisor = static_cast<float>(kept);
  } else if (params.mode == kMeanSqrtLen) {
    divisor = share = sqrtf(static_cast<float>(kept));
  } else if (params.mode == kWeightedMean && team.segment >= 0) {
    const int64_t n = kept, before = shared.before[team.segment];
    divisor = static_cast<float>(n * before + n * (n + 1) / 2);
  }
  if constexpr (!kMaxMode) row.multiply(1.0f / (kept > 0 ? divisor : 1.0f));
  if constexpr (kNorm && !kMaxMode) {
    row.scale_and_shift(params.weight, params.ln_bias, share, lane);
  }
  if (kept <= 0) row.fill(0.0f);
  row.clear_beyond(lane);
  if (params.normalize) {
    const float norm = sqrtf(group_sum<Layout>(row.lane_squares(), shared.sums.norm));
    row.multiply(1.0f / (norm < 1e-12f ? 1e-12f : norm));
  }
  if (team.segment < 0 || team.group > 0) return;
  int64_t target = block_index() + static_cast<int64_t>(team.segment) * num_blocks();
  if (params.out_rows != nullptr) target = params.out_rows[target];
  row.store_fp32(params.out + target * params.out_stride, params.out_aligned, lane);
}

template <class T, class Layout, bool kNorm, bool kMaxMode>
SBF_KERNEL(kPoolThreads<kNorm>, (kPoolBlocks<Layout, kNorm, kMaxMode>))
pool_kernel(PoolParams params) {
  SBF_SHARED PoolShared<Layout, kNorm> shared;
  const RowLane<Layout> lane(params.E);
  if (thread_index() < 32) {
    find_segments(params, shared);
    plan_rounds(shared);
  }
  sync_block();
#pragma unroll 1
  for (int round = shared.begin; round < shared.end; ++round) {
    Row<Layout> row;
    row.fill(kMaxMode ? -infinity() : 0.0f);
    {
      const Team team = team_of(shared, round);
      const Tokens tokens = tokens_of(shared, team);
      const int offset =
          team.segment < 0 ? 0 : shared.before[team.segment] + 1 - shared.first[team.segment];
      if constexpr (kNorm) {
        add_normalized<T, Layout, kMaxMode>(params, lane, tokens, offset, shared.sums, row);
      } else {
        add_tokens<T, Layout, kMaxMode>(params, lane, tokens, offset, row);
      }
    }
    // Nothing but the row outlives the loop: what is known is read once more.
    sync_warp();
    const Team team = team_of(shared, round);
    if (team.groups > 1) merge_groups<Layout, kNorm, kMaxMode>(shared, team, row);
    finish<Layout, kNorm, kMaxMode>(params, shared, lane, team, row);
  }
}

}  // namespace sbert_fast::cuda
