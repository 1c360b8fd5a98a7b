#include "planner.h"

#include <algorithm>
#include <cstddef>
#include <numeric>

namespace sbert_fast::host {
namespace {

// Below this many counters a counting sort is cheap whatever the number of texts.
constexpr int64_t kFreeCounters = 1 << 16;

void counting_sort(std::span<const int32_t> lengths, int32_t longest, std::span<int64_t> order) {
  std::vector<int64_t> next(static_cast<size_t>(longest) + 2, 0);
  // next[k] ends as the position of the first text whose length is longest - k.
  for (const int32_t length : lengths) ++next[static_cast<size_t>(longest - length) + 1];
  std::partial_sum(next.begin(), next.end(), next.begin());
  for (size_t i = 0; i < lengths.size(); ++i) {
    order[static_cast<size_t>(next[static_cast<size_t>(longest - lengths[i])]++)] =
        static_cast<int64_t>(i);
  }
}

void sort_longest_first(std::span<const int32_t> lengths, std::span<int64_t> order) {
  if (lengths.empty()) return;
  const int32_t longest = *std::max_element(lengths.begin(), lengths.end());
  // One absurdly long text must not cost gigabytes of counters.
  if (longest <= std::max(kFreeCounters, static_cast<int64_t>(lengths.size()))) {
    counting_sort(lengths, longest, order);
    return;
  }
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [lengths](int64_t a, int64_t b) {
    return lengths[static_cast<size_t>(a)] > lengths[static_cast<size_t>(b)];
  });
}

}  // namespace

std::vector<int64_t> plan_batches(std::span<const int32_t> lengths, int64_t budget,
                                  std::span<int64_t> order) {
  sort_longest_first(lengths, order);
  std::vector<int64_t> starts{0};
  int64_t used = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    const int64_t length = lengths[static_cast<size_t>(order[i])];
    const bool batch_is_empty = starts.back() == static_cast<int64_t>(i);
    // `used` may exceed `budget` when one long text is alone, so the sum is not rearranged.
    if (!batch_is_empty && used + length > budget) {
      starts.push_back(static_cast<int64_t>(i));
      used = 0;
    }
    used += length;
  }
  if (!order.empty()) starts.push_back(static_cast<int64_t>(order.size()));
  return starts;
}

std::vector<Tile> plan_tiles(std::span<const int32_t> lengths, int32_t tile) {
  std::vector<Tile> tiles;
  Tile open{0, 0, 0, 0};
  const auto close = [&tiles, &open](int32_t offset, int32_t next_seq) {
    if (open.q_end > open.q_start) tiles.push_back(open);
    open = {offset, offset, next_seq, 0};
  };
  for (size_t i = 0; i < lengths.size(); ++i) {
    const auto sequence = static_cast<int32_t>(i);
    const int32_t start = open.q_end;
    const int32_t end = start + lengths[i];
    if (end - open.q_start > tile) close(start, sequence);
    if (lengths[i] <= tile) {
      open.q_end = end;
      ++open.num_seqs;
      continue;
    }
    for (int64_t q = start; q < end; q += tile) {
      const auto stop = static_cast<int32_t>(std::min<int64_t>(q + tile, end));
      tiles.push_back({static_cast<int32_t>(q), stop, sequence, 1});
    }
    open = {end, end, sequence + 1, 0};
  }
  close(open.q_end, 0);
  return tiles;
}

}  // namespace sbert_fast::host
