// Which segments a block of the pooling kernel owns, and which threads compute which of them when.
#pragma once

#include "params.h"
#include "rows.cuh"

namespace sbert_fast::cuda {

/// Threads of a block: fewer with LayerNorm, so that each has the registers it takes.
template <bool kNorm>
inline constexpr int kPoolThreads = kNorm ? 384 : 512;
inline constexpr int kTeamThreads = 128;
inline constexpr int kShortTokens = 16;
inline constexpr int kMediumTokens = 128;
inline constexpr int kMaxOwned = 32;
inline constexpr int kMaxTeams = 4;

/// Segments that a block can own: one for each of its groups.
template <class Layout, bool kNorm>
inline constexpr int kOwned = kPoolThreads<kNorm> / Layout::kLanes;

/// Blocks on a multiprocessor at the least, by the registers that a row takes.
template <class Layout, bool kNorm, bool kMaxMode>
inline constexpr int kPoolBlocks = Layout::kPieces + (kMaxMode ? 1 + kNorm : 0) <= 3 ? 2 : 1;

template <class Layout, bool kNorm>
struct PoolShared {
  static constexpr int kSlots = (kPoolThreads<kNorm> / Layout::kUnit + 1) / 2;
  /// Rows on their way through the tree, sixteen bytes of a thread beside those of its neighbour.
  alignas(16) float row[kSlots][Layout::kValues / 4][Layout::kUnit][4];
  GroupSums sums;
  int32_t first[kMaxOwned];   // token
  int32_t kept[kMaxOwned];    // tokens pooled, or -1: there is no such segment
  int32_t before[kMaxOwned];  // tokens of the segment in front of them
  // What the block does one after the other: rounds [begin, end), of which the first gives every
  // group its segment, those up to `teams` give one to every team, the others are for all threads.
  int32_t begin, teams, end;
  int32_t segment[kMaxOwned + 1][kMaxTeams];
};

/// Which threads compute a segment, as seen from one of them.
struct Team {
  int segment;  // among those of the block, or -1
  int groups;
  int group;  // of this thread
};

/// The tokens of the segments that the block owns; the first warp calls.
template <class Layout, bool kNorm>
SBF_DEVICE void find_segments(const PoolParams& params, PoolShared<Layout, kNorm>& shared) {
  const int slot = thread_index();
  const int64_t segment = block_index() + static_cast<int64_t>(slot) * num_blocks();
  int32_t kept = -1;
  if (slot < kOwned<Layout, kNorm> && segment < params.segments) {
    const int32_t* range = params.ranges + segment * (params.spans ? 2 : 1);
    const int64_t start = range[0], end = range[1], length = end - start;
    int64_t first = start + params.skip;
    int64_t tokens = length > params.skip ? length - params.skip : 0;
    if (params.mode == kCls) {
      first = length > params.skip ? first : start;
      tokens = length > 0 ? 1 : 0;
    } else if (params.mode == kLastToken) {
      first = end - 1;
      tokens = tokens > 0 ? 1 : 0;
    }
    kept = static_cast<int32_t>(tokens);
    shared.first[slot] = static_cast<int32_t>(first);
    shared.before[slot] = static_cast<int32_t>(first - start);
  }
  shared.kept[slot] = kept;
}

/// What the block does in which round; the first warp calls.
template <class Layout, bool kNorm>
SBF_DEVICE void plan_rounds(PoolShared<Layout, kNorm>& shared) {
  constexpr int kTeams = Layout::kLanes < kTeamThreads ? kPoolThreads<kNorm> / kTeamThreads : 0;
  constexpr int kMedium = kTeams > 0 ? kMediumTokens : kShortTokens;
  sync_warp();
  const int32_t kept = shared.kept[thread_index()];
  const uint32_t small = ballot(kept >= 0 && kept <= kShortTokens);
  uint32_t medium = ballot(kept > kShortTokens && kept <= kMedium);
  uint32_t large = ballot(kept > kMedium);
  if (thread_index() > 0) return;
  int round = 1;
  for (; medium != 0; ++round) {
    for (int team = 0; team < kTeams; ++team, medium &= medium - 1) {
      shared.segment[round][team] = medium != 0 ? count_trailing_zeros(medium) : -1;
    }
  }
  shared.begin = small != 0 ? 0 : 1;
  shared.teams = round;
  for (; large != 0; ++round, large &= large - 1) {
    for (int team = 0; team < kMaxTeams; ++team) {
      shared.segment[round][team] = count_trailing_zeros(large);
    }
  }
  shared.end = round;
}

template <class Layout, bool kNorm>
SBF_DEVICE Team team_of(const PoolShared<Layout, kNorm>& shared, int round) {
  constexpr int kTeamGroups = Layout::kLanes < kTeamThreads ? kTeamThreads / Layout::kLanes : 1;
  const int group = static_cast<int>(static_cast<uint32_t>(thread_index()) / Layout::kLanes);
  if (round == 0) {
    const int kept = shared.kept[group];
    return {kept >= 0 && kept <= kShortTokens ? group : -1, 1, 0};
  }
  const int segment = shared.segment[round][thread_index() / kTeamThreads];
  if (round < shared.teams) return {segment, kTeamGroups, group % kTeamGroups};
  return {segment, kOwned<Layout, kNorm>, group};
}

}  // namespace sbert_fast::cuda
