// Products of rows of x and panels on tiles, for linear and linear_norm: bf16, int8, or fp32 that
// is split into sums of two bf16, of which three products are taken: all but that of the lesser
// parts.
//
// A block of 32 rows and 32 columns has its sums in four tiles, from the first step along K to the
// last: a row goes through the same steps in whatever block it is, so it depends on no other row
// and not on how many there are. A block of rows stays in the L1 cache, weights pass by it; while a
// group of weights is used on all rows of an item, the next one is asked for. Vector units work in
// small steps between the tile instructions.
#pragma once

#include "kernels.h"
#if defined(SBF_PORTABLE_TILES)
#include "tile_portable.h"
#else
#include "tile_amx.h"
#endif

namespace sbert_fast::cpu::SBF_ISA {

constexpr int64_t kBlockRows = 32, kBlockColumns = 32;
constexpr int64_t kTileBytes = kTileRowsMax * kTileRowBytes;  // of a strip
constexpr int64_t kLineBytes = 64;
/// The more rows, the less often weights come from beyond the L2 cache.
constexpr LinearItems kTileItems{
    .row_step = kBlockRows, .least_rows = 2 * kBlockRows, .most_rows = 256, .panel_step = 2};

SBF_INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
SBF_INLINE int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
SBF_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An fp32 as a sum of two bf16, which lie apart (SplitParams).
struct SplitFloat {
  bf16 greater, lesser;
};

// T is bf16; int8_t for bytes of x and int8 weights, whose sums are int32; or SplitFloat.
template <class T>
constexpr bool kIsSplit = sizeof(T) == sizeof(SplitFloat);
// Tiles of a row of x, and of a strip of weights, that a step along K takes.
template <class T>
constexpr int64_t kPartsOfStep = kIsSplit<T> ? 2 : 1;

template <class T>
SBF_INLINE bool fits_tiles(const LinearParams& p) {
  const int64_t step_bytes = kPartsOfStep<T> * kTileRowBytes;
  return p.K > 0 && p.K * static_cast<int64_t>(sizeof(T)) % step_bytes == 0;
}

// Rows, at most kBlockRows of them, the first of two strips of columns, and steps along K.
struct Block {
  int64_t row, rows, strip, step, step_end;
};

/// Steps along K after which the next block of columns has its turn: as many as leave the values of
/// a block of rows in the L1 cache.
constexpr int64_t kRunSteps = 16;

// Consecutive memory that is asked for piece by piece, to be in the L2 cache when it is needed.
class AskedAhead {
 public:
  void start(const void* from, const void* end, int64_t pieces) {
    from_ = static_cast<const char*>(from);
    end_ = static_cast<const char*>(end);
    piece_ = divide_up(divide_up(end_ - from_, kLineBytes), pieces) * kLineBytes;
  }
  SBF_INLINE void next() {
    if (from_ >= end_) return;
    const char* const end = from_ + piece_;
    for (; from_ != end; from_ += kLineBytes) __builtin_prefetch(from_, 0, 2);
  }

 private:
  const char *from_ = nullptr, *end_ = nullptr;
  int64_t piece_ = 0;
};

template <class T>
class BlockProduct {
  static constexpr bool kInt8 = sizeof(T) == 1;

 public:
  /// `group_bytes`: of weights that are used on all rows of an item before the next ones.
  /// `run_steps`: at most as many are taken along K before the next block of columns.
  BlockProduct(const LinearParams& p, int64_t group_bytes, int64_t run_steps)
      : x_(static_cast<const char*>(p.x)),
        panels_(static_cast<const char*>(p.panels)),
        x_stride_(p.K * static_cast<int64_t>(sizeof(T))),
        steps_(x_stride_ / kStepRowBytes),
        strips_(panel_count(p.N, p.gated) * kStripsPerPanel),
        group_(larger_of(1, group_bytes / (2 * steps_ * kStepBytes))),
        run_steps_(divide_up(steps_, divide_up(steps_, run_steps))) {}

  /// How often run() calls `meanwhile`: what vector units do comes in pieces, since the tiles wait
  /// while a long one is in the way.
  int64_t pauses() const { return 3 * kProducts * steps_; }

  /// Blocks side by side whose weights stay in the cache.
  int64_t group() const { return group_; }

  /// Whether a block is complete with these steps.
  bool completes(const Block& block) const { return block.step_end == steps_; }

  /// What stands before a strip of int8 weights; before the last one, if there are fewer.
  const float* header(int64_t strip) const {
    const char* const first = weights(smaller_of(strip, strips_ - 1));
    return reinterpret_cast<const float*>(first - kHeaderBytes);
  }

  /// Calls body(Block) for the rows [row, row_end) of the strips [strip, strip_end), a group of
  /// blocks after another; what does not fill a block comes last.
  template <class Body>
  SBF_INLINE void for_each_block(int64_t row, int64_t row_end, int64_t strip, int64_t strip_end,
                                 Body body) {
    const int64_t whole_end = row + (row_end - row) / kBlockRows * kBlockRows;
    const int64_t bounds[] = {row, whole_end, row_end};
    for (int part = 0; part < 2; ++part) {
      if (bounds[part] == bounds[part + 1]) continue;
      const int64_t row_blocks = divide_up(bounds[part + 1] - bounds[part], kBlockRows);
      for (int64_t first = strip; first < strip_end; first += 2 * group()) {
        const int64_t last = smaller_of(first + 2 * group(), strip_end);
        const int64_t blocks = divide_up(last - first, 2);
        ask_for_weights(last < strip_end ? last : strip, first, strip_end, row_blocks * blocks);
        for (int64_t t = bounds[part]; t < bounds[part + 1]; t += kBlockRows) {
          const int64_t rows = smaller_of(kBlockRows, bounds[part + 1] - t);
          if (first == strip) ask_for_rows(t + kBlockRows, row_end, blocks);
          for (int64_t step = 0; step < steps_; step += run_steps_) {
            const int64_t step_end = smaller_of(step + run_steps_, steps_);
            for (int64_t i = first; i < last; i += 2) body(Block{t, rows, i, step, step_end});
          }
        }
      }
    }
  }

  /// sums[row][0, kBlockColumns) = the products, or += from the second run of steps on, rows
  /// `stride` elements apart; `meanwhile()` runs pauses() times in all steps of a block. Rows that
  /// do not fill two tiles are two that may share one, or a single tile.
  template <class Meanwhile>
  SBF_INLINE void run(const Block& block, float* sums, int64_t stride, Meanwhile meanwhile) {
    const bool has_lower = block.rows > kTileRowsMax;
    const int64_t height = has_lower ? (block.rows + 1) / 2 : block.rows;
    if (height != height_) tiles_.configure(height_ = height);
    const char* upper = x_ + block.row * x_stride_ + block.step * kStepRowBytes;
    const char* left = weights(block.strip) + block.step * kStepBytes;
    const char* right = weights(smaller_of(block.strip + 1, strips_ - 1)) + block.step * kStepBytes;
    const char* const end = left + (block.step_end - block.step) * kStepBytes;
    if (has_lower) {
      const int64_t first = block.rows - height;
      float* const lower_sums = sums + first * stride;
      begin<0>(block, sums, stride);
      begin<2>(block, lower_sums, stride);
      multiply<true>(upper, upper + first * x_stride_, left, right, end, meanwhile);
      store<0>(sums, stride * 4);
      store<2>(lower_sums, stride * 4);
    } else {
      begin<0>(block, sums, stride);
      multiply<false>(upper, upper, left, right, end, meanwhile);
      store<0>(sums, stride * 4);
    }
  }

 private:
  static constexpr int kProducts = kIsSplit<T> ? 3 : 1;                // of a step
  static constexpr int64_t kStepBytes = kPartsOfStep<T> * kTileBytes;  // of a strip
  static constexpr int64_t kStepRowBytes = kPartsOfStep<T> * kTileRowBytes;
  static constexpr int64_t kHeaderBytes = kInt8 ? kInt8Header * kTileRowBytes : 0;

  // Those of the next group, or the first one for the rows of the next item.
  void ask_for_weights(int64_t strip, int64_t current, int64_t strip_end, int64_t blocks) {
    if (strip == current) return;
    const int64_t end = smaller_of(strip + 2 * group_, strip_end);
    weights_ahead_.start(weights(strip), weights(end), blocks * kProducts * steps_);
  }

  // Rows of x lie apart for a tile: what no hardware prefetcher follows.
  void ask_for_rows(int64_t row, int64_t row_end, int64_t blocks) {
    const int64_t end = smaller_of(row + kBlockRows, row_end);
    rows_ahead_.start(x_ + row * x_stride_, x_ + end * x_stride_, blocks * kProducts * steps_);
  }

  const char* weights(int64_t strip) const {
    return panels_ + strip * (steps_ * kStepBytes + kHeaderBytes) + kHeaderBytes;
  }

  template <int FIRST>
  SBF_INLINE void begin(const Block& block, const float* sums, int64_t stride) {
    if (block.step > 0) {
      tiles_.template load<FIRST>(sums, stride * 4);
      tiles_.template load<FIRST + 1>(sums + kStripColumns, stride * 4);
    } else {
      tiles_.template zero<FIRST>(), tiles_.template zero<FIRST + 1>();
    }
  }

  template <int FIRST>
  SBF_INLINE void store(float* sums, int64_t stride) {
    tiles_.template store<FIRST>(sums, stride);
    tiles_.template store<FIRST + 1>(sums + kStripColumns, stride);
  }

  template <int SUMS, int LEFT, int RIGHT>
  SBF_INLINE void multiply_add() {
    if constexpr (kInt8) {
      tiles_.template multiply_add_bytes<SUMS, LEFT, RIGHT>();
    } else {
      tiles_.template multiply_add<SUMS, LEFT, RIGHT>();
    }
  }

  template <bool kHasLower, class Meanwhile>
  SBF_INLINE void multiply(const char* upper, const char* lower, const char* left,
                           const char* right, const char* end, Meanwhile& meanwhile) {
    AskedAhead rows_ahead = rows_ahead_, weights_ahead = weights_ahead_;
    const int64_t stride = x_stride_;
    tiles_.template load_passing<6>(left, kTileRowBytes);
    tiles_.template load_constant<4>(upper, stride);
    if constexpr (kHasLower) tiles_.template load_constant<5>(lower, stride);
    tiles_.template load_passing<7>(right, kTileRowBytes);
    for (int product = 0;;) {
      // Of split operands: the lesser part of the weights by the greater of x, then the greater one
      // by both.
      const bool next_weights = !kIsSplit<T> || product != 1;
      const bool next_rows = !kIsSplit<T> || product != 0;
      if constexpr (kIsSplit<T>) product = product == 2 ? 0 : product + 1;
      if (next_weights) left += kTileBytes, right += kTileBytes;
      if (next_rows) upper += kTileRowBytes, lower += kTileRowBytes;
      const bool is_last = left == end;
      multiply_add<0, 4, 6>();
      meanwhile();
      if constexpr (kHasLower) multiply_add<2, 5, 6>();
      if (next_weights && !is_last) tiles_.template load_passing<6>(left, kTileRowBytes);
      meanwhile();
      multiply_add<1, 4, 7>();
      if (next_rows && !is_last) tiles_.template load_constant<4>(upper, stride);
      if constexpr (kHasLower) multiply_add<3, 5, 7>();
      meanwhile();
      rows_ahead.next();
      weights_ahead.next();
      if (is_last) break;
      if (next_weights) tiles_.template load_passing<7>(right, kTileRowBytes);
      if (kHasLower && next_rows) tiles_.template load_constant<5>(lower, stride);
    }
    rows_ahead_ = rows_ahead;
    weights_ahead_ = weights_ahead;
  }

  const char *const x_, *const panels_;
  const int64_t x_stride_, steps_, strips_, group_, run_steps_;
  AskedAhead rows_ahead_, weights_ahead_;
  int64_t height_ = 0;  // rows of the tiles
  TileRegisters tiles_;
};

}  // namespace sbert_fast::cpu::SBF_ISA
