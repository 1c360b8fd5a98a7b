// Operations of the tensor cores on the registers of a warp.
#pragma once

#include <cstring>

#include "emulated_fibers.h"
#include "emulated_memory.h"
#include "emulated_numbers.h"

namespace sbert_fast::cuda {

struct alignas(16) Vector {
  uint32_t word[4];
};

namespace emulation {

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

/// d += a b: exact products, added up in fp32 one after the other.
template <class T>
void multiply_fragments(Operands operands) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    const auto& own = *static_cast<const Product*>(operands[lane]);
    const int row = lane / 4, column = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        a[row + i % 2 * 8][column + i / 2 * 8 + half] = unpack_half<T>(own.a[i], half);
      }
      for (int i = 0; i < 2; ++i) {
        b[column + i * 8 + half][row] = unpack_half<T>(own.b[i], half);
      }
    }
  }
  float d[16][8];
  const auto each = [&](auto&& use) {
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      float* own = static_cast<const Product*>(operands[lane])->d;
      for (int i = 0; i < 4; ++i) use(own[i], d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
    }
  };
  each([](float own, float& sum) { sum = own; });
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  each([](float& own, float sum) { own = sum; });
}

using Matrix = uint16_t[8][8];

/// What lane l gets of a matrix: two neighbours of column l / 4.
inline uint32_t neighbours(const Matrix& matrix, int lane) {
  const int row = lane / 4, column = lane % 4 * 2;
  const uint16_t low = matrix[column][row], high = matrix[column + 1][row];
  return low | static_cast<uint32_t>(high) << 16;
}

inline void transpose_fragments(Operands operands) {
  Matrix matrix;
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    std::memcpy(&matrix[lane / 4][lane % 4 * 2], operands[lane], sizeof(uint32_t));
  }
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    *static_cast<uint32_t*>(operands[lane]) = neighbours(matrix, lane);
  }
}

struct MatrixRow {
  const void* row;
  Vector result;
};

inline void load_fragments(Operands operands) {
  Matrix matrices[4];
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    std::memcpy(matrices[lane / 8][lane % 8], static_cast<MatrixRow*>(operands[lane])->row, 16);
  }
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    for (int i = 0; i < 4; ++i) {
      static_cast<MatrixRow*>(operands[lane])->result.word[i] = neighbours(matrices[i], lane);
    }
  }
}

inline Vector load_column_fragments(const Site& site, const void* row) {
  require_aligned(site.operation, row);
  require_shared(site.operation, row, 16);
  MatrixRow operand = {row, {}};
  meet_warp(site, &operand, load_fragments);
  return operand.result;
}

}  // namespace emulation
}  // namespace sbert_fast::cuda
