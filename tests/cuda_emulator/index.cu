// The index arithmetic of csrc/cuda for tests/test_cuda_index.py, which calls it through ctypes.
#include <cstdio>
#include <exception>

#include "attention_index.h"
#include "pool_launch.cuh"

using namespace sbert_fast::cuda;

#define SBF_EXPORT extern "C" __attribute__((visibility("default")))

SBF_EXPORT void sbf_tile_of_sequences(const int32_t* table, int index, int group, int sequences,
                                      int32_t* out) {
  const Tile tile = tile_of_sequences(table, index, group, sequences);
  out[0] = tile.q_start, out[1] = tile.q_end, out[2] = tile.first, out[3] = tile.last;
}

SBF_EXPORT void sbf_tile_of_queries(const int32_t* table, const int32_t* cu_seqlens, int index,
                                    int blocks, int rows, int32_t* out) {
  const Tile tile = tile_of_queries(table, cu_seqlens, index, blocks, rows);
  out[0] = tile.q_start, out[1] = tile.q_end, out[2] = tile.first, out[3] = tile.last;
}

SBF_EXPORT int sbf_in_window(int distance, int window) { return in_window(distance, window); }
SBF_EXPORT int sbf_bias_column(int distance, int R) { return bias_column(distance, R); }

SBF_EXPORT void sbf_visible_keys(int q_first, int q_last, int length, int window, int block,
                                 int32_t* out) {
  const Keys keys = visible_keys(q_first, q_last, length, window, block);
  out[0] = keys.first, out[1] = keys.last;
}

SBF_EXPORT int sbf_offset_by_pairs(int row, int column, int width) {
  return offset_by_pairs(row, column, width);
}
SBF_EXPORT int sbf_offset_by_columns(int row, int column, int width) {
  return offset_by_columns(row, column, width);
}

namespace {

/// Calls function(RowLayout, std::bool_constant) for rows of E columns, with LayerNorm or without.
template <class Function>
void with_pool_layout(int E, bool norm, const Function& function) {
  with_row_layout(E, [&](auto layout) {
    norm ? function(layout, std::true_type()) : function(layout, std::false_type());
  });
}

/// What the blocks of a pooling kernel have planned.
struct PoolPlan {
  int32_t* tokens;  // [blocks, kMaxOwned, 3]: first, kept, before
  int32_t* rounds;  // [blocks, 3]: begin, teams, end
  int32_t* teams;   // [blocks, kMaxOwned + 1, threads, 3]: segment, groups, group
};

template <class Layout, bool kNorm>
SBF_KERNEL(kPoolThreads<kNorm>, 1)
plan_kernel(PoolParams params, PoolPlan plan) {
  SBF_SHARED PoolShared<Layout, kNorm> shared;
  const int thread = thread_index();
  if (thread < 32) {
    find_segments(params, shared);
    plan_rounds(shared);
    int32_t* tokens = plan.tokens + (block_index() * kMaxOwned + thread) * 3;
    tokens[0] = shared.first[thread];
    tokens[1] = shared.kept[thread];
    tokens[2] = shared.before[thread];
  }
  sync_block();
  int32_t* rounds = plan.rounds + block_index() * 3;
  rounds[0] = shared.begin, rounds[1] = shared.teams, rounds[2] = shared.end;
  for (int round = shared.begin; round < shared.end; ++round) {
    const Team team = team_of(shared, round);
    const int place = (block_index() * (kMaxOwned + 1) + round) * block_threads() + thread;
    int32_t* out = plan.teams + place * 3;
    out[0] = team.segment, out[1] = team.groups, out[2] = team.group;
  }
}

}  // namespace

SBF_EXPORT void sbf_pool_shape(int E, bool norm, int32_t* out) {
  with_pool_layout(E, norm, [&](auto layout, auto kNorm) {
    using Layout = decltype(layout);
    out[0] = kPoolThreads<kNorm>, out[1] = Layout::kLanes, out[2] = kOwned<Layout, kNorm>;
  });
}

SBF_EXPORT int64_t sbf_count_pool_blocks(int E, bool norm, int mode, int64_t T, int64_t segments) {
  PoolParams params{};
  params.mode = static_cast<PoolMode>(mode), params.T = T, params.segments = segments;
  int64_t blocks = 0;
  with_pool_layout(E, norm, [&](auto layout, auto kNorm) {
    blocks = count_pool_blocks<decltype(layout), kNorm>(params);
  });
  return blocks;
}

/// What the emulator finds wrong is `error` afterwards, empty where that is nothing.
SBF_EXPORT void sbf_plan_pool(int E, bool norm, int mode, int64_t skip, const int32_t* ranges,
                              bool spans, int64_t segments, int64_t blocks, int32_t* tokens,
                              int32_t* rounds, int32_t* teams, char* error, size_t error_bytes) {
  PoolParams params{};
  params.ranges = ranges, params.spans = spans, params.segments = segments;
  params.mode = static_cast<PoolMode>(mode), params.skip = skip;
  const PoolPlan plan = {tokens, rounds, teams};
  error[0] = 0;
  try {
    with_pool_layout(E, norm, [&](auto layout, auto kNorm) {
      launch("plan_pool", plan_kernel<decltype(layout), kNorm>, blocks, kPoolThreads<kNorm>, 0,
             nullptr, params, plan);
    });
  } catch (const std::exception& thrown) {
    std::snprintf(error, error_bytes, "%s", thrown.what());
  }
}
