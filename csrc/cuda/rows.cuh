// Rows of E columns, E a multiple of 8 up to 4,096, held in registers, and LayerNorm over them.
//
// A group of threads holds a row in pieces of eight columns, 16 bytes: thread l of it the pieces l,
// l + kLanes, l + 2 kLanes, ... Up to 384 columns a group is half a warp, so that 384 is three full
// pieces a lane; up to 1,024 it is a warp; wider rows take four warps. The last pieces of a lane
// may lie beyond the row: they repeat its last piece and count as zeros.
//
// Numerics: fp32 sums of a lane, then of the group as a tree of shuffles: an order that E decides.
#pragma once

#include "device.cuh"

namespace sbert_fast::cuda {

/// Rows by groups of kLaneCount threads, kPieceCount pieces each, of which kFullCount never lie
/// beyond the row.
template <int kLaneCount, int kPieceCount, int kFullCount>
struct RowLayout {
  static constexpr int kLanes = kLaneCount;
  static constexpr int kPieces = kPieceCount;
  static constexpr int kFull = kFullCount;
  static constexpr int kValues = kPieceCount * 8;
  /// Threads that reduce without shared memory, or a wider group.
  static constexpr int kUnit = kLaneCount < 32 ? 32 : kLaneCount;
};

/// Calls function(RowLayout) with the layout of rows of E columns.
template <class Function>
void with_row_layout(int32_t E, Function&& function) {
  if (E <= 128) return function(RowLayout<16, 1, 0>());
  if (E <= 256) return function(RowLayout<16, 2, 1>());
  if (E <= 384) return function(RowLayout<16, 3, 2>());
  if (E <= 512) return function(RowLayout<32, 2, 1>());
  if (E <= 768) return function(RowLayout<32, 3, 2>());
  if (E <= 1024) return function(RowLayout<32, 4, 3>());
  if (E <= 2048) return function(RowLayout<128, 2, 1>());
  return function(RowLayout<128, 4, 2>());
}

/// The place of a thread in its group, and what it holds of a row.
template <class Layout>
struct RowLane {
  int start;  // its first column
  int width;  // of the row

  SBF_DEVICE explicit RowLane(int32_t E)
      : start(static_cast<int>(static_cast<uint32_t>(thread_index()) % Layout::kLanes * 8)),
        width(E) {}

  /// Whether piece i of this lane is part of the row.
  SBF_DEVICE bool live(int i) const {
    return i < Layout::kFull || start < width - i * Layout::kLanes * 8;
  }
  /// The columns from the first one to piece i, to the last piece of the row where it is not live.
  SBF_DEVICE int offset(int i) const {
    return live(i) ? i * Layout::kLanes * 8 : width - 8 - start;
  }
};

/// The group that a thread is part of, counted over the blocks.
template <class Layout>
SBF_DEVICE uint32_t group_index(int threads) {
  return static_cast<uint32_t>(block_index()) * (threads / Layout::kLanes) +
         static_cast<uint32_t>(thread_index()) / Layout::kLanes;
}

struct alignas(16) Quad {
  float value[4];
};

/// Eight fp32 numbers from a multiple of 16 bytes.
SBF_DEVICE void load_8(float (&value)[8], const float* address) {
  const Quad low = *reinterpret_cast<const Quad*>(address);
  const Quad high = *reinterpret_cast<const Quad*>(address + 4);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    value[j] = low.value[j];
    value[4 + j] = high.value[j];
  }
}

SBF_DEVICE void store_8(float* address, const float* value) {
  *reinterpret_cast<Quad*>(address) = {value[0], value[1], value[2], value[3]};
  *reinterpret_cast<Quad*>(address + 4) = {value[4], value[5], value[6], value[7]};
}

/// The 16-bit numbers of a row as they lie in memory.
template <class Layout>
struct RawRow {
  Vector piece[Layout::kPieces];

  /// Starts the loads of the row whose column lane.start is at `row`, all at once.
  template <class T>
  SBF_DEVICE void load(const T* row, const RowLane<Layout>& lane) {
#pragma unroll
    for (int i = 0; i < Layout::kPieces; ++i) piece[i] = load_16(row + lane.offset(i));
  }

  /// Zeros, and nothing is read, where not `present`.
  template <class T>
  SBF_DEVICE void load_if(bool present, const T* row, const RowLane<Layout>& lane) {
#pragma unroll
    for (int i = 0; i < Layout::kPieces; ++i) {
      piece[i] = Vector{};
      if (present) piece[i] = load_16(row + lane.offset(i));
    }
  }
};

/// A row in fp32.
template <class Layout>
struct Row {
  float value[Layout::kValues];

  SBF_DEVICE void fill(float number) {
#pragma unroll
    for (int j = 0; j < Layout::kValues; ++j) value[j] = number;
  }

  template <class T>
  SBF_DEVICE void assign(const RawRow<Layout>& raw) {
#pragma unroll
    for (int j = 0; j < Layout::kValues; j += 2) {
      const float2 pair = unpack<T>(raw.piece[j / 8].word[j / 2 % 4]);
      value[j] = pair.x;
      value[j + 1] = pair.y;
    }
  }

  template <class T>
  SBF_DEVICE void add(const RawRow<Layout>& raw) {
#pragma unroll
    for (int j = 0; j < Layout::kValues; j += 2) {
      const float2 pair = unpack<T>(raw.piece[j / 8].word[j / 2 % 4]);
      value[j] += pair.x;
      value[j + 1] += pair.y;
    }
  }

  /// Adds the fp32 row whose column lane.start is at `row`.
  SBF_DEVICE void add_fp32(const float* row, const RowLane<Layout>& lane) {
#pragma unroll
    for (int i = 0; i < Layout::kPieces; ++i) {
      float term[8];
      load_8(term, row + lane.offset(i));
#pragma unroll
      for (int j = 0; j < 8; ++j) value[i * 8 + j] += term[j];
    }
  }

  /// x + bias + residual; there is no bias where not `has_bias`, though some vector is read.
  template <class T>
  SBF_DEVICE void assign_sum(const RawRow<Layout>& x, const float* bias, bool has_bias,
                             const RawRow<Layout>& residual, const RowLane<Layout>& lane) {
#pragma unroll
    for (int i = 0; i < Layout::kPieces; ++i) {
      sync_warp();
      float term[8];
      load_8(term, bias + lane.start + lane.offset(i));
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const float2 a = unpack<T>(x.piece[i].word[j / 2]);
        const float2 b = unpack<T>(residual.piece[i].word[j / 2]);
        value[i * 8 + j] = a.x + (has_bias ? term[j] : 0.0f) + b.x;
        value[i * 8 + j + 1] = a.y + (has_bias ? term[j + 1] : 0.0f) + b.y;
      }
    }
  }

  /// value * weight + share * bias, vectors over the columns.
  SBF_DEVICE void scale_and_shift(const float* weight, const float* bias, float share,
                                  const RowLane<Layout>& lane) {
#pragma unroll
    for (int i = 0; i < Layout::kPieces; ++i) {
      // Loads do not move up past this: the registers of all of them at once would be too many.
      sync_warp();
      scale_and_shift_piece(i, weight, bias, share, lane);
    }
  }

  SBF_DEVICE void scale_and_shift_piece(int i, const float* weight, const float* bias, float share,
                                        const RowLane<Layout>& lane) {
    float factor[8], term[8];
    load_8(factor, weight + lane.start + lane.offset(i));
    load_8(term, bias + lane.start + lane.offset(i));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      value[i * 8 + j] = fma(value[i * 8 + j], factor[j], share * term[j]);
    }
  }

  SBF_DEVICE void multiply(float factor) {
#pragma unroll
    for (int j = 0; j < Layout::kValues; ++j) value[j] *= factor;
  }

  /// Zeros where the lane's pieces lie beyond the row.
  SBF_DEVICE void clear_beyond(const RowLane<Layout>& lane) {
#pragma unroll
    for (int i = Layout::kFull; i < Layout::kPieces; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) value[i * 8 + j] = lane.live(i) ? value[i * 8 + j] : 0.0f;
    }
  }

  SBF_DEVICE float lane_sum() const {
    float total = 0;
#pragma unroll
    for (int j = 0; j < Layout::kValues; j += 8) {
      const float* v = value + j;
      total += ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    }
    return total;
  }

  SBF_DEVICE float lane_squares() const {
    float even = 0, odd = 0;
#pragma unroll
    for (int j = 0; j < Layout::kValues; j += 2) {
      even = fma(value[j], value[j], even);
      odd = fma(value[j + 1], value[j + 1], odd);
    }
    return even + odd;
  }

  /// To the row at `row`; with `aligned`, which begins at a multiple of 16 bytes.
  SBF_DEVICE void store_fp32(float* row, bool aligned, const RowLane<Layout>& lane) const {
#pragma unroll
    for (int i = 0; i < Layout::kPieces; ++i) {
      if (!lane.live(i)) continue;
      float* piece = row + lane.start + lane.offset(i);
      if (aligned) {
        store_8(piece, value + i * 8);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) piece[j] = value[i * 8 + j];
      }
    }
  }

  /// value * weight + bias, rounded once, to the row whose column lane.start is at `row`; nothing
  /// is written where not `present`. Piece by piece: no load moves up past a store, so that few
  /// registers hold weights.
  template <class T>
  SBF_DEVICE void store_scaled(T* row, bool present, const float* weight, const float* bias,
                               const RowLane<Layout>& lane) {
#pragma unroll
    for (int i = 0; i < Layout::kPieces; ++i) {
      scale_and_shift_piece(i, weight, bias, 1.0f, lane);
      Vector piece;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        piece.word[j] = pack<T>(value[i * 8 + 2 * j], value[i * 8 + 2 * j + 1]);
      }
      if (present && lane.live(i)) store_16(row + lane.offset(i), piece);
    }
  }
};

/// What groups of several warps need to add up: a place for each warp of a block, for each of the
/// sums that may be under way.
struct GroupSums {
  static constexpr int kWarps = 16;
  float mean[kWarps];
  float variance[kWarps];
  float norm[kWarps];
};

/// The sum of `value` over the group; with more than a warp a group, all threads of the block call.
///
/// The same `place` may be used again once all threads have passed another barrier.
template <class Layout>
SBF_DEVICE float group_sum(float value, float* place) {
  constexpr int kWarpLanes = Layout::kLanes < 32 ? Layout::kLanes : 32;
#pragma unroll
  for (int mask = kWarpLanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if constexpr (Layout::kLanes > 32) {
    const int warp = thread_index() / 32;
    if (thread_index() % 32 == 0) place[warp] = value;
    sync_block();
    const float* first = place + warp / 4 * 4;
    static_assert(Layout::kLanes == 128, "four warps are added");
    value = (first[0] + first[1]) + (first[2] + first[3]);
  }
  return value;
}

/// row - mean, in place; the factor that makes its variance 1. Two passes over registers.
template <class Layout>
SBF_DEVICE float center(Row<Layout>& row, const RowLane<Layout>& lane, float inverse_width,
                        float eps, GroupSums& sums) {
  row.clear_beyond(lane);
  const float mean = group_sum<Layout>(row.lane_sum(), sums.mean) * inverse_width;
#pragma unroll
  for (int j = 0; j < Layout::kValues; ++j) row.value[j] -= mean;
  row.clear_beyond(lane);
  const float variance = group_sum<Layout>(row.lane_squares(), sums.variance) * inverse_width;
  return rsqrt_approx(variance + eps);
}

}  // namespace sbert_fast::cuda
