// TileRegisters on AMX. tile_portable.h has the same class for every CPU.
//
// Eight tiles of at most 16 rows of 64 bytes. Operands hold pairs of bf16 in 32-bit lanes, sums are
// fp32; or four bytes, and sums are int32. Inline assembly: GCC's intrinsics do not tell it which
// memory they read and write.
#pragma once

#include <stdint.h>

#include "vec.h"

namespace sbert_fast::cpu::SBF_ISA {

constexpr int kTileRowsMax = 16;
constexpr int64_t kTileRowBytes = 64;
constexpr int kLeftTiles = 6;  // tiles 0 to 5: sums, and operands whose rows are rows of the sums
constexpr int kNumTiles = 8;   // tiles 6 and 7: operands whose columns are columns of the sums

/// The tiles of this thread, for as long as the object lives.
class TileRegisters {
 public:
  TileRegisters() = default;
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() { asm volatile("tilerelease"); }

  /// Gives tiles 0 to 5 `rows` rows, the others 16; all tiles become zero.
  void configure(int64_t rows) {
    Config config{};
    config.palette = 1;
    for (int tile = 0; tile < kNumTiles; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = tile < kLeftTiles ? static_cast<uint8_t>(rows) : kTileRowsMax;
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
  }

  template <int TILE>
  SBF_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
  }

  /// Rows are `stride` bytes apart.
  template <int TILE>
  SBF_INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE) : "memory");
  }

  /// As load(), of memory that nothing writes for as long as the object lives.
  template <int TILE>
  SBF_INLINE void load_constant(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE));
  }

  /// As load_constant(), of what will not be needed again soon: it takes no place in the L1 cache.
  template <int TILE>
  SBF_INLINE void load_passing(const void* from, int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE));
  }

  template <int TILE>
  SBF_INLINE void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(TILE) : "memory");
  }

  /// Tile SUMS += left * right. A sum adds up the first values of 16 pairs one by one, apart from
  /// them the second ones, then both to what it was. Subnormal inputs and results count as zero.
  template <int SUMS, int LEFT, int RIGHT>
  SBF_INLINE void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(LEFT), "i"(RIGHT));
  }

  /// The same in int32, exactly: unsigned bytes of the left tile, signed ones of the right.
  template <int SUMS, int LEFT, int RIGHT>
  SBF_INLINE void multiply_add_bytes() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(LEFT), "i"(RIGHT));
  }

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

}  // namespace sbert_fast::cpu::SBF_ISA
