// TileRegisters of tile_amx.h in plain vectors: the code that runs on tiles is tested with them on
// CPUs that have none. The bits are those of AMX unless a product or a sum of products is
// subnormal.
#pragma once

#include <stdint.h>

#include "vec.h"

namespace sbert_fast::cpu::SBF_ISA {

constexpr int kTileRowsMax = 16;
constexpr int64_t kTileRowBytes = 64;
constexpr int kLeftTiles = 6;
constexpr int kNumTiles = 8;

class TileRegisters {
 public:
  TileRegisters() = default;
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  void configure(int64_t rows) {
    rows_ = rows;
    // NaN, not zero, so that no one relies on it.
    for (int tile = 0; tile < kNumTiles; ++tile) fill(tile, __builtin_nanf(""));
  }

  template <int TILE>
  void zero() {
    fill(TILE, 0.0f);
  }

  template <int TILE>
  __attribute__((noinline)) void load(const void* from, int64_t stride) {
    for (int64_t row = 0; row < rows_of(TILE); ++row) {
      __builtin_memcpy(tiles_[TILE][row], static_cast<const char*>(from) + row * stride, kRowBytes);
    }
  }

  template <int TILE>
  void load_constant(const void* from, int64_t stride) {
    load<TILE>(from, stride);
  }

  template <int TILE>
  void load_passing(const void* from, int64_t stride) {
    load<TILE>(from, stride);
  }

  template <int TILE>
  __attribute__((noinline)) void store(void* to, int64_t stride) const {
    for (int64_t row = 0; row < rows_of(TILE); ++row) {
      __builtin_memcpy(static_cast<char*>(to) + row * stride, tiles_[TILE][row], kRowBytes);
    }
  }

  template <int SUMS, int LEFT, int RIGHT>
  __attribute__((noinline)) void multiply_add_bytes() {
    for (int64_t row = 0; row < rows_; ++row) {
      for (int lane = 0; lane < kLanesOfRow; lane += VecF::N) {
        float* const at = tiles_[SUMS][row] + lane;
        VecF sum = VecF::load(at);
        for (int k = 0; k < kLanesOfRow; ++k) {
          const VecF bytes = VecF::set1(tiles_[LEFT][row][k]);
          sum = dot_bytes(bytes, VecF::load(tiles_[RIGHT][k] + lane), sum);
        }
        sum.store(at);
      }
    }
  }

  template <int SUMS, int LEFT, int RIGHT>
  __attribute__((noinline)) void multiply_add() {
    for (int64_t row = 0; row < rows_; ++row) {
      for (int lane = 0; lane < kLanesOfRow; lane += VecF::N) {
        multiply_lanes(tiles_[LEFT][row], tiles_[RIGHT], lane, tiles_[SUMS][row] + lane);
      }
    }
  }

 private:
  static constexpr int kLanesOfRow = 16, kRowBytes = 64;

  int64_t rows_of(int tile) const { return tile < kLeftTiles ? rows_ : kTileRowsMax; }

  void fill(int tile, float value) {
    for (auto& row : tiles_[tile]) {
      for (float& lane : row) lane = value;
    }
  }

  static SBF_INLINE VecF flush(VecF v) {
    const VecF smallest = VecF::set1(1.17549435e-38f);
    return select_lt(abs(v), smallest, copysign(VecF::zero(), v), v);
  }

  static void multiply_lanes(const float* left, const float (*right)[kLanesOfRow], int lane,
                             float* sums) {
    VecF first = VecF::zero(), second = VecF::zero();
    for (int k = 0; k < kLanesOfRow; ++k) {
      const VecF a = VecF::set1(left[k]), b = VecF::load(right[k] + lane);
      first = flush(fma(flush(first_of_pairs(a)), flush(first_of_pairs(b)), first));
      second = flush(fma(flush(second_of_pairs(a)), flush(second_of_pairs(b)), second));
    }
    flush(VecF::load(sums) + flush(first + second)).store(sums);
  }

  int64_t rows_ = 0;
  float tiles_[kNumTiles][kTileRowsMax][kLanesOfRow];
};

}  // namespace sbert_fast::cpu::SBF_ISA
