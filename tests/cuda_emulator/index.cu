// The index arithmetic of csrc/cuda for tests/test_cuda_index.py, which calls it through ctypes.
#include "attention_index.h"

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
