// Which rows, keys and bytes a thread of the attention kernels has: plain arithmetic, the same on a
// host, where tests/test_cuda_index.py compares it with brute force.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace sbert_fast::cuda {

/// Rows of a query block, and keys of a key block, of the short kernel.
inline constexpr int kRows = 16;
/// Columns of a head that four neighbouring lanes hold, 16 bytes each.
inline constexpr int kChunk = 32;
/// Keys of a block of the long kernel, counted from the start of the sequence.
inline constexpr int kKeys = 64;

/// The longest sequence of the short kernel. It decides about bits, so it may not depend on the
/// batch.
inline constexpr int kShort = 64;

SBF_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// Consecutive sequences [first, last), and of each the queries [q_start, q_end), packed offsets.
struct Tile {
  int q_start;
  int q_end;
  int first;
  int last;
};

/// Tile `index` of a table; without one, of `group` whole sequences.
SBF_HOST_DEVICE Tile tile_of_sequences(const int32_t* table, int index, int group, int sequences) {
  if (table != nullptr) {
    const int32_t* row = table + 4 * static_cast<int64_t>(index);
    return {row[0], row[1], row[2], row[2] + row[3]};
  }
  const int first = index * group;
  return {0, INT32_MAX, first, first + group < sequences ? first + group : sequences};
}

/// Tile `index` of a table; without one, query block `index % blocks`, of `rows` rows, of sequence
/// `index / blocks`. It may lie behind the end of the sequence.
SBF_HOST_DEVICE Tile tile_of_queries(const int32_t* table, const int32_t* cu_seqlens, int index,
                                     int blocks, int rows) {
  if (table != nullptr) {
    const int32_t* row = table + 4 * static_cast<int64_t>(index);
    return {row[0], row[1], row[2], row[2] + row[3]};
  }
  const int sequence = index / blocks;
  const int64_t start = cu_seqlens[sequence] + static_cast<int64_t>(index % blocks) * rows;
  const int end = cu_seqlens[sequence + 1];
  const int q_start = static_cast<int>(start < end ? start : end);
  return {q_start, end - q_start < rows ? end : q_start + rows, sequence, sequence + 1};
}

/// Whether a key at `distance` behind its query may be seen; a negative window is none.
SBF_HOST_DEVICE bool in_window(int distance, int window) {
  return window < 0 || (-window <= distance && distance <= window);
}

/// Column of the relative bias [2R + 1] of a key at `distance` behind its query.
SBF_HOST_DEVICE int bias_column(int distance, int R) {
  const int above = distance < -R ? -R : distance;
  return (above > R ? R : above) + R;
}

/// Keys [first, last) that the queries [q_first, q_last) of a sequence of `length` may see; `first`
/// is a multiple of `block`.
struct Keys {
  int first;
  int last;
};
SBF_HOST_DEVICE Keys visible_keys(int q_first, int q_last, int length, int window, int block) {
  if (window < 0) return {0, length};
  const int first = q_first > window ? (q_first - window) / block * block : 0;
  const int64_t last = static_cast<int64_t>(q_last) + window;
  return {first, last < length ? static_cast<int>(last) : length};
}

/// Where the 16 bytes of columns `column` .. `column + 7` of a row lie in a block of shared memory,
/// of rows of `width` numbers, 32, 64 or 128, whose rows are read in pairs, 64 bytes of each: those
/// of an even row and the one behind it are in different banks.
SBF_HOST_DEVICE int offset_by_pairs(int row, int column, int width) {
  const int turn = width == 32 ? 0 : row % 2 * 4;
  return (row * (width / 8) + (column / 8 ^ turn)) * 16;
}

/// The same for a block that is read eight rows at a time, 16 bytes of each: eight rows that start
/// at a multiple of eight have a column in different banks.
SBF_HOST_DEVICE int offset_by_columns(int row, int column, int width) {
  const int turn = width == 32 ? row / 2 % 4 : row % 8;
  return (row * (width / 8) + (column / 8 ^ turn)) * 16;
}

}  // namespace sbert_fast::cuda
