// The batch planner: which texts share a batch, and which sequences share a tile.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace sbert_fast::host {

// A run of packed rows that one attention program owns: rows [q_start, q_end), in token offsets,
// of the sequences [first_seq, first_seq + num_seqs).
struct Tile {
  int32_t q_start;
  int32_t q_end;
  int32_t first_seq;
  int32_t num_seqs;
};

// Sorts texts by length, longest first, equal lengths in their original order, and cuts the result
// into batches of at most `budget` tokens. A text longer than `budget` is a batch of its own.
//
// lengths: [N], none negative. order: [N], filled with text indices.
// Returns starts [num_batches + 1]: batch b holds order[starts[b]] .. order[starts[b + 1] - 1].
// Time O(N + longest), memory O(N) beyond the outputs.
std::vector<int64_t> plan_batches(std::span<const int32_t> lengths, int64_t budget,
                                  std::span<int64_t> order);

// Groups consecutive whole sequences into tiles of at most `tile` tokens; an empty sequence joins
// for free, and empty ones alone make no tile. A sequence longer than `tile` is cut into
// ceil(length / tile) tiles of its own.
//
// lengths: [B], none negative, their sum below 2^31. Time O(B + number of tiles).
std::vector<Tile> plan_tiles(std::span<const int32_t> lengths, int32_t tile);

}  // namespace sbert_fast::host
